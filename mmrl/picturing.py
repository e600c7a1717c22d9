"""Prompts and pictures as an environment: a policy answers each prompt with one picture, and rewards say what it is worth.

An episode is one step long. The policy sees one user message, text and for editing the pictures to edit, and its action is one
message that shows a picture; of several the last counts, and a message without one earns nothing. What is paid is

    r = sum_i w_i s_i

over the ``rewards``; those of weight 0 are measured and not paid, so that they can watch the others. Each score is a metric of
the step (``score_NAME``) and stands in the transcript, for a stage's ``rewards`` to combine otherwise. A picture that a reward
with a weight could not score (NaN) is lost: its episode counts for nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.columns import Column
from mmrl.component import Component
from mmrl.errors import ConfigError, TrainingError
from mmrl.messages import Message
from mmrl.protocols import AsyncReward, TurnReward
from mmrl.rewarding import RewardBlock
from mmrl.transcripts import DrawingQuestions, Question, Questions, Transcript, Turn
from mmrl.types import Observation, Step

SCORE = "score_"  # what the name of a reward's metric begins with
_ROUNDING = 1e-6  # of a sum of weighted scores
_Scores = Sequence[float]


@plain_dataclass
class _Slot:
    """A prompt and what became of it. drawn: by the prompts themselves, if they were asked to. paid: None until it is over."""

    transcript: Transcript
    drawn: Message | None = None
    paid: float | None = None

    @property
    def lost(self) -> bool:
        return self.paid is not None and math.isnan(self.paid)


@plain_dataclass
class _Handed:
    """Slots that were answered together, those of them that show a picture, and for rewards that score these already, by their
    place: the functions that wait for the scores."""

    answered: list[int]
    shown: list[int]
    waits: dict[int, Callable[[], _Scores]]


class PictureEnvironment:
    """See the module. Satisfies Environment, AsyncEnvironment, GradualEnvironment, ExpertEnvironment and TalkingEnvironment."""

    action_spec: Any = None
    max_steps = 1

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
    class Config:
        """Fields of a ``mmrl.picturing:PictureEnvironment`` block."""

        prompts: Component
        """What is asked for, such as ``simulators.image_prompts:ShapePrompts``."""
        rewards: list[RewardBlock] = field(default_factory=list)
        """What pictures are worth: blocks of a reward's fields, ``weight`` and ``name``; weight 0: measured and not paid. Without
        any, only a picture that the prompts have drawn themselves is a success, as demonstrations need it."""
        pass_mark: float = Field(default=1.0, gt=0)
        """What a picture must earn to count as a success."""

        @model_validator(mode="after")
        def _named(self) -> PictureEnvironment.Config:
            names = [reward.name for reward in self.rewards]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"rewards has {names.count(name)} rewards called '{name}'; give each a 'name' of its own")
            return self

    @staticmethod
    def pays(config: Config) -> bool:
        """Whether pictures earn anything; see mmrl.config."""
        return any(reward.weight for reward in config.rewards)

    def __init__(self, config: Config, *, num_envs: int, device: torch.device) -> None:
        self.config, self.num_envs, self.device = config, num_envs, device
        prompts: Any = config.prompts.build()
        if not isinstance(prompts, Questions):
            raise ConfigError(f"'prompts.target' ({config.prompts.target}) asks nothing; use one of simulators.image_prompts")
        self.prompts: Questions = prompts
        self._rewards: list[tuple[RewardBlock, Any]] = [(block, block.build()) for block in config.rewards]
        self._slots: list[_Slot] = []
        self._handed: list[_Handed] = []

    # -- episodes ------------------------------------------------------------------------------------------------------

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        begun: dict[int, Transcript] = {}
        slots: list[_Slot] = []
        for slot, task in enumerate(task_ids_B.tolist()):
            if where_B is not None and not where_B[slot]:
                slots.append(self._slots[slot])
                continue
            if task not in begun:  # a group shares its prompt, and the very message that says it
                question = self.prompts.question(task)
                begun[task] = Transcript(task, question, (Message("user", question.parts),), (), None, "running")
            slots.append(_Slot(begun[task]))
        self._slots, self._handed = slots, []
        return self._observe()

    def step(self, actions: Any, /) -> Step:
        return self.begin_step(actions)()

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        observation = self.reset(task_ids_B, where_B)
        return lambda: observation

    def begin_step(self, actions: Any, /) -> Callable[[], Step]:
        self.hand_in(actions, torch.arange(self.num_envs))
        return self.end_step

    def hand_in(self, actions: Any, rows_N: Tensor, /) -> None:
        """Rewards that score in the background (AsyncReward) begin with it; all others score the whole step at its end."""
        answered: list[int] = []
        for slot, message in zip(rows_N.tolist(), actions.tolist(), strict=True):
            running = self._slots[slot]
            if running.paid is None and message is not None:
                answer = "" if message.pictures else None
                running.transcript = replace(running.transcript, turns=(Turn(message),), answer=answer, ended="answer")
                answered.append(slot)
        shown = [slot for slot in answered if self._slots[slot].transcript.turns[-1].message.pictures]
        transcripts = [self._slots[slot].transcript for slot in shown]
        apart = {place: each for place, (_, each) in enumerate(self._rewards) if shown and isinstance(each, AsyncReward)}
        self._handed.append(_Handed(answered, shown, {place: each.begin(transcripts) for place, each in apart.items()}))

    def end_step(self) -> Step:
        handed, self._handed = self._handed, []
        answered = [slot for each in handed for slot in each.answered]
        shown = [slot for each in handed for slot in each.shown]
        scores = [self._scores(place, handed, shown) for place in range(len(self._rewards))] if shown else []
        return self._end_step(answered, shown, scores)

    def _end_step(self, answered: list[int], shown: list[int], scores: list[_Scores]) -> Step:
        for (block, reward), given in zip(self._rewards, scores, strict=False):
            self._check(block, reward, shown, given)
        by_slot = dict(zip(shown, zip(*scores, strict=True), strict=True)) if scores else {}
        ran_B = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        for slot in answered:
            self._settle(self._slots[slot], by_slot.get(slot, (0.0,) * len(self._rewards)))
            ran_B[slot] = True
        over_B = torch.tensor([slot.paid is not None for slot in self._slots], device=self.device)
        lost_B = torch.tensor([slot.lost for slot in self._slots], device=self.device)
        paid_B = torch.tensor([slot.paid or 0.0 for slot in self._slots], device=self.device)
        metrics = {"success": torch.tensor([float(self._succeeded(slot)) for slot in self._slots], device=self.device)}
        for block, _ in self._rewards:
            given = [slot.transcript.scores.get(block.name, 0.0) for slot in self._slots]
            metrics[f"{SCORE}{block.name}"] = torch.tensor(given, device=self.device)
        rewards_B = torch.where(ran_B & ~lost_B, paid_B, 0.0)
        never_B = torch.zeros_like(over_B)
        return Step(self._observe(), rewards_B[:, None], ran_B[:, None], over_B & ~lost_B, never_B, metrics, lost_B)

    def _scores(self, place: int, handed: Sequence[_Handed], shown: Sequence[int]) -> _Scores:
        """What the reward at ``place`` gives the pictures of the slots ``shown``, in their order."""
        reward = self._rewards[place][1]
        transcripts = [self._slots[slot].transcript for slot in shown]
        if isinstance(reward, AsyncReward):
            scores = [score for each in handed if place in each.waits for score in each.waits[place]()]
        elif isinstance(reward, TurnReward):
            scores = [math.fsum(turns) for turns in reward.per_turn(transcripts)]
        else:
            scores = reward(transcripts)
        if len(scores) != len(shown):
            raise ValueError(f"{type(reward).__name__} gave {len(scores)} scores for {len(shown)} pictures")
        return scores

    def _settle(self, slot: _Slot, scores: Sequence[float]) -> None:
        """The end of an episode."""
        named = {block.name: float(score) for (block, _), score in zip(self._rewards, scores, strict=True)}
        slot.transcript = replace(slot.transcript, scores=named)
        slot.paid = math.fsum(block.weight * named[block.name] for block, _ in self._rewards if block.weight)

    def _succeeded(self, slot: _Slot) -> bool:
        if slot.paid is None or slot.lost:
            return False
        if not self._rewards:
            return slot.drawn is not None and slot.transcript.turns[-1].message is slot.drawn
        return slot.paid >= self.config.pass_mark - _ROUNDING

    def _check(self, block: RewardBlock, reward: Any, shown: list[int], scores: _Scores) -> None:
        """Raises TrainingError for a reward that counts and could score none of several pictures: nothing would be learned."""
        pictures = {id(self._slots[slot].transcript.turns[-1].message) for slot in shown}
        if block.weight and len(pictures) > 1 and all(math.isnan(score) for score in scores):
            why = getattr(reward, "failure", None) or f"{block.target} gave no number"
            raise TrainingError(f"'environment.rewards.{block.name}' could score none of {len(pictures)} pictures: {why}")

    # -- what else it can tell -------------------------------------------------------------------------------------------

    def expert_action(self) -> Any:
        """What the prompts draw themselves in each slot: a Column of messages, nothing where none runs."""
        prompts = self.prompts
        if not isinstance(prompts, DrawingQuestions):
            raise ConfigError(f"'prompts.target' ({self.config.prompts.target}) draws nothing; take pictures from a file instead")
        for slot in self._slots:
            if slot.drawn is None and slot.paid is None:
                told = slot.transcript
                drawn = prompts.draw(told.question, random.Random(f"draw {told.task_id}"))
                slot.drawn = Message("assistant", (drawn,))
        return Column.of([slot.drawn if slot.paid is None else None for slot in self._slots], self.device)

    def transcript(self, slot: int) -> Transcript:
        return self._slots[slot].transcript

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        known: dict[int, Question] = {slot.transcript.task_id: slot.transcript.question for slot in self._slots}
        return tuple((known.get(task) or self.prompts.question(task)).family for task in task_ids_M.tolist())

    def close(self) -> None:
        for _, reward in self._rewards:
            if hasattr(reward, "close"):
                reward.close()

    def _observe(self) -> Observation:
        asked = tuple(slot.transcript.opening[-1].text for slot in self._slots)
        return Observation({}, None, asked, conversations=tuple(slot.transcript.messages for slot in self._slots))
