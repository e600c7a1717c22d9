"""Rewards of a stage: what a rollout's conversations are worth, in place of what the environment paid.

    r_t = sum_i w_i s_it  +  w_env r_env,t

s_i is the i-th reward: a score of an episode stands at the episode's last decision, a score of a turn at that turn's decision.
Where ``rewards`` are given, the environment's own reward counts only with ``scoring.environment`` as its weight. A reward of
weight 0 is logged and changes nothing.

``normalised`` first puts each reward on the scale of its group, so that none drowns another: with S the sum of an episode's
scores, mean and standard deviation (unbiased) over the episodes of its task, s_t becomes s_t / (std + 1e-6), and mean / (std +
1e-6) is taken off at the last decision; an episode's scores then add up to (S - mean) / (std + 1e-6). Where all episodes of a
task have the same S, the reward tells nothing of them and has no scale: it is 0 there, in every turn. With GRPO's ``scale:
batch_std`` that is GDPO (arXiv 2601.05242).

An episode of which a score failed (NaN) counts for nothing, as one that the simulator lost: its decisions are not valid, and it
is no longer among the rollout's episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from torch import Tensor

from mmrl.component import Component, Problem, Problems, class_name, validate
from mmrl.errors import TrainingError
from mmrl.protocols import TurnReward
from mmrl.rewards.pictures import number
from mmrl.transcripts import Transcript, by_task
from mmrl.types import EpisodeRecord, Rollout

EPS = 1e-6
ENVIRONMENT = "(environment)"  # what the environment paid, among the scores of an episode: no reward can be called so


class _Head(BaseModel):
    """What a reward's block has beside ``target`` and the fields of its class."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]
    weight: FiniteFloat = 1.0


@dataclass(frozen=True)
class RewardBlock(Component):
    """An item of ``rewards``, validated: a component with a weight, and a name in metrics and overrides.

    Left out, the name is the class's (``CodeVision``: code_vision).
    """

    name: str
    weight: float

    @classmethod
    def parse(cls, block: Any) -> RewardBlock:
        """Validate a mapping of ``target``, ``name``, ``weight`` and the fields of the class. Raises Problems."""
        if isinstance(block, RewardBlock):
            return block
        fields = dict(block) if isinstance(block, Mapping) else block
        head = {key: fields.pop(key) for key in _Head.model_fields if key in fields} if isinstance(fields, dict) else {}
        component, wrong = None, []
        try:
            component = Component.parse(fields)
            _refuse_others(component)
            head.setdefault("name", class_name(component.target))
        except Problems as error:
            wrong += error.items
            head.setdefault("name", "unnamed")
        try:
            valid = validate(_Head, head)
        except Problems as error:
            raise Problems([*wrong, *error.items]) from error
        if component is None or wrong:
            raise Problems(wrong)
        return cls(component.target, component.cls, component.config, valid.name, valid.weight)

    def dump(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight, **super().dump()}


def _refuse_others(component: Component) -> None:
    """Raises Problems for a class that is no reward."""
    if not any(name in vars(base) for base in component.cls.__mro__ for name in ("__call__", "per_turn")):
        raise Problems([Problem(("target",), "", f": {component.target} is no reward; it has neither __call__ nor per_turn")])


@dataclass(frozen=True)
class _Scores:
    """One reward's scores: what it adds to each decision, the sum over an episode, and which episodes it could not score."""

    name: str
    weight: float
    places_TB: Tensor
    totals_M: Tensor
    failed_M: Tensor


class Scorer:
    """The rewards of a stage, built. where: their dotted key, for messages. Without rewards it leaves rollouts as they are."""

    def __init__(self, blocks: Sequence[RewardBlock], where: str, combine: str, environment: float) -> None:
        self._where, self._normalise, self._environment = where, combine == "normalised", environment
        self._rewards = [(block, block.build()) for block in blocks]

    @property
    def weights(self) -> dict[str, float]:
        """Of what counts, by the names that scores of episodes have."""
        own = self._environment if self._rewards else 1.0
        named = {block.name: block.weight for block, _ in self._rewards} | {ENVIRONMENT: own}
        return {name: weight for name, weight in named.items() if weight}

    def score(self, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """The rollout with these rewards, and what there is to log. Raises TrainingError where one that counts scored nothing."""
        episodes = rollout.episodes
        if not self._rewards or len(episodes.task_ids_M) == 0:
            return rollout, {}
        metrics: dict[str, float] = {}
        columns = [self._ask(block, reward, rollout, metrics) for block, reward in self._rewards]
        own = rollout.rewards_TB.double() * rollout.valid_TB
        paid_M = episodes.returns_M.double()
        columns.append(_Scores(ENVIRONMENT, self._environment, own, paid_M, torch.zeros_like(columns[0].failed_M)))
        counted = [column for column in columns if column.weight]
        failed_M = torch.stack([column.failed_M & (column.weight != 0) for column in columns]).any(0)
        rewards_TB = torch.zeros_like(own)
        for column in counted:
            on_scale_TB = _normalised(column.places_TB, episodes, ~failed_M) if self._normalise else column.places_TB
            rewards_TB += column.weight * on_scale_TB
        metrics["rollout/unscored_episodes"] = float(failed_M.sum())
        scores = {column.name: column.totals_M for column in columns}
        scored = replace(rollout, episodes=replace(episodes, scores=scores))
        return _rewarded(scored, rewards_TB, failed_M), metrics

    def _ask(self, block: RewardBlock, reward: Any, rollout: Rollout, metrics: dict[str, float]) -> _Scores:
        """One reward's scores; adds what it has to say to ``metrics``."""
        episodes, name = rollout.episodes, f"reward/{block.name}"
        assert episodes.spans_M3 is not None
        spans, transcripts = episodes.spans_M3.tolist(), episodes.transcripts
        places_TB = torch.zeros(rollout.rewards_TB.shape, dtype=torch.float64)
        totals: list[float] = []
        for (slot, first, last), scores in zip(spans, self._scores(block, reward, transcripts), strict=True):
            turns = list(scores) if isinstance(scores, Sequence) else [0.0] * (last - first) + [scores]
            if len(turns) != last - first + 1:
                raise ValueError(f"{block.target} scored {len(turns)} turns of an episode of {last - first + 1}")
            totals.append(math.fsum(turns))
            if not math.isnan(totals[-1]):
                places_TB[first : last + 1, slot] = torch.tensor(turns, dtype=torch.float64)
        scored = [total for total in totals if not math.isnan(total)]
        if not scored and block.weight:  # one that only watches may fail
            why = getattr(reward, "failure", None) or f"{block.target} gave no number"
            raise TrainingError(f"'{self._where}.{block.name}' could score none of {len(totals)} episodes: {why}")
        if scored:
            metrics[name] = math.fsum(scored) / len(scored)
        metrics[f"{name}/failed"] = 1 - len(scored) / len(totals)
        metrics.update({f"{name}/{term}": float(mean) for term, mean in getattr(reward, "terms", {}).items()})
        failed_M = torch.tensor([math.isnan(total) for total in totals])
        device, totals_M = rollout.rewards_TB.device, torch.tensor(totals, dtype=torch.float64)
        return _Scores(block.name, block.weight, places_TB.to(device), totals_M.to(device), failed_M.to(device))

    @staticmethod
    def _scores(block: RewardBlock, reward: Any, transcripts: Sequence[Transcript]) -> Sequence[float | Sequence[float]]:
        scores = reward.per_turn(transcripts) if isinstance(reward, TurnReward) else reward(transcripts)
        if len(scores) != len(transcripts):
            raise ValueError(f"{block.target} gave {len(scores)} scores for {len(transcripts)} conversations")
        return [[*map(number, each)] if isinstance(each, list | tuple) else number(each) for each in scores]


def _normalised(places_TB: Tensor, episodes: EpisodeRecord, scored_M: Tensor) -> Tensor:
    """Scores on the scale of their group's scored episodes; those of a group of one, or without spread, are 0."""
    assert episodes.spans_M3 is not None
    spans, placed_TB = episodes.spans_M3.tolist(), torch.zeros_like(places_TB)
    for members in by_task(episodes.transcripts).values():
        own = [spans[m] for m in members if scored_M[m]]
        if len(own) < 2:
            continue
        totals = torch.stack([places_TB[first : last + 1, slot].sum() for slot, first, last in own])
        spread = totals.std()
        if spread < EPS:
            continue
        scale = spread + EPS
        for slot, first, last in own:
            placed_TB[first : last + 1, slot] = places_TB[first : last + 1, slot] / scale
            placed_TB[last, slot] -= totals.mean() / scale
    return placed_TB


def _rewarded(rollout: Rollout, rewards_TB: Tensor, failed_M: Tensor) -> Rollout:
    """The rollout with other rewards, and without the episodes that could not be scored."""
    assert rollout.episodes.spans_M3 is not None
    valid_TB = rollout.valid_TB.clone()
    returns = []
    for (slot, first, last), failed in zip(rollout.episodes.spans_M3.tolist(), failed_M.tolist(), strict=True):
        returns.append(rewards_TB[first : last + 1, slot].sum())
        if failed:
            valid_TB[first : last + 1, slot] = False
    dtype = rollout.rewards_TB.dtype
    episodes = replace(rollout.episodes, returns_M=torch.stack(returns).to(rollout.episodes.returns_M.dtype))
    kept = episodes.select((~failed_M).nonzero()[:, 0])
    return replace(rollout, rewards_TB=(rewards_TB * valid_TB).to(dtype), valid_TB=valid_TB, episodes=kept)
