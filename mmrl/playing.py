"""Playing episodes with the deterministic policy, such that an episode does not depend on those beside it.

Its random numbers are its own (``mmrl.numerics.draws``). That leaves rounding: a matrix product of another number of rows rounds
differently, enough to tip an episode that stands on the edge. So the policy is always asked about ``act_batch`` observations at
once, and an episode always has the same seat among them: its task id modulo ``act_batch``. Whose observations fill the other
seats changes nothing, as every kernel computes its rows one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmrl.checkpoint import atomic_write_text
from mmrl.columns import cat, put
from mmrl.conversing import Talk
from mmrl.keeping import write_conversation
from mmrl.numerics.draws import Draws
from mmrl.protocols import Environment, GradualEnvironment, Policy, RenderEnvironment
from mmrl.report.video import write_animation
from mmrl.rollout import Finish, begin_act, hand_in
from mmrl.seeding import derive_seed
from mmrl.transcripts import TalkingEnvironment
from mmrl.types import Action, Observation, Step

VIDEO_FPS = 10
ATTEMPTS = 3  # how often an episode is played that the simulator loses

Outcome = Literal["success", "failure", "timeout", "lost"]


@dataclass(frozen=True)
class Played:
    """How one episode ended.

    failure: the task ended by itself, without success. timeout: its time was up before that. lost: the simulator broke down at
    every attempt, so the episode counts for nothing. return_: undiscounted. steps: of the environment. talk: what was counted in
    its conversation, where the environment talks; no part of what makes two episodes equal, for tools take time. metrics: of the
    environment's last step, beside success; without those that are no number.
    """

    task_id: int
    family: str
    instruction: str
    outcome: Outcome
    return_: float
    steps: int
    talk: Talk | None = field(default=None, compare=False)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As it stands in episodes.jsonl and beside its video."""
        return {
            "task_id": self.task_id,
            "family": self.family,
            "instruction": self.instruction,
            "outcome": self.outcome,
            "success": self.outcome == "success",
            "timed_out": self.outcome == "timeout",
            "steps": self.steps,
            "return": self.return_,
            **({} if self.talk is None else self.talk.row()),
            **({"metrics": dict(self.metrics)} if self.metrics else {}),
        }


class Reel(NamedTuple):
    """Where episodes are kept: as ``folder``/``stem``-TASK.json, which says ``about`` and how it ended, and what goes with it.

    pictures_alone: whether nothing is kept but episodes that were answered with a picture, as these cost little.
    """

    folder: Path
    stem: str
    about: Mapping[str, str | int]
    pictures_alone: bool = False


def stage_reel(folder: Path, stage: str, label: str) -> Reel:
    """Of an evaluation of a run."""
    return Reel(folder, f"{stage}-{label}", {"label": label, "stage": stage})


def reel_within(folder: Path, stage: str, iteration: int) -> Reel:
    """Of an evaluation between two iterations of a stage, of which ``iteration`` are over."""
    about = {"label": "during", "stage": stage, "iteration": iteration}
    return Reel(folder, f"{stage}-during-{iteration:06d}", about, pictures_alone=True)


class Player:
    """Plays episodes of ``environment``, each once.

    seed: of the policy's random numbers. act_batch: observations that the policy is asked about at once.
    """

    def __init__(self, policy: Policy, environment: Environment, *, seed: int, act_batch: int, device: torch.device) -> None:
        self.policy, self.environment, self.device = policy, environment, device
        self.stream, self.act_batch = derive_seed(seed, "evaluation"), act_batch

    @torch.no_grad()
    def play(
        self, tasks: Collection[int], advance: Callable[[int], None], reel: Reel | None = None, filmed: Collection[int] = ()
    ) -> list[Played]:
        """These tasks, ``num_envs`` at a time, in their order; ``advance`` is told of those that are over.

        An episode that the simulator loses is played again, ATTEMPTS times in all. The tasks ``filmed`` go to ``reel``: on video,
        or written down where they are conversations.
        """
        played: dict[int, Played] = {}
        pending = list(tasks)
        for _ in range(ATTEMPTS):
            for start in range(0, len(pending), self.environment.num_envs):
                chunk = pending[start : start + self.environment.num_envs]
                ended = self._round(chunk, reel, filmed)
                played |= {episode.task_id: episode for episode in ended}
                advance(sum(episode.outcome != "lost" for episode in ended))
            pending = [task for task in pending if played[task].outcome == "lost"]
            if not pending:
                break
        return [played[task] for task in tasks]

    def decide(self, observation: Observation, task_ids_N: Tensor, decision: int) -> Action:
        """What to execute in N slots, ``act_batch`` observations at a time, each in its seat."""
        place_N, occupant_PS = seats(task_ids_N, self.act_batch)
        draws = Draws.of(self.stream, task_ids_N, decision)
        actions = [
            self.policy.act(observation.select(occupant_S), draws.select(occupant_S), explore=False).action
            for occupant_S in occupant_PS
        ]
        return cat(actions)[place_N]

    def _decided(
        self, observation: Observation, tasks_N: Tensor, rows_N: Tensor, decision: int
    ) -> Iterator[tuple[Finish[None], Tensor]]:
        """The decisions of ``decide``, one batch after the other, with the slots that they are for; none for slots to spare."""
        place_N, occupant_PS = seats(tasks_N, self.act_batch)
        draws = Draws.of(self.stream, tasks_N, decision)
        for batch, occupant_S in enumerate(occupant_PS):
            there_N = place_N // self.act_batch == batch
            seat_M = place_N[there_N] % self.act_batch
            finish = begin_act(self.policy, observation.select(occupant_S), draws.select(occupant_S), explore=False)
            yield lambda finish=finish, seat_M=seat_M: (None, finish().action[seat_M]), rows_N[there_N]

    def _round(self, tasks: list[int], reel: Reel | None, filmed: Collection[int]) -> list[Played]:
        """At most ``num_envs`` tasks; slots to spare repeat the last one."""
        environment, n = self.environment, len(tasks)
        tasks_B = torch.tensor(tasks + tasks[-1:] * (environment.num_envs - n), device=self.device)
        observation = environment.reset(tasks_B)
        instructions, score = observation.instructions, _Score(tasks_B)
        recorder = _recorder(environment, [slot for slot, task in enumerate(tasks) if task in filmed], reel)
        recorder.look()
        for decision in count():
            rows_N = (~score.done_B[:n]).nonzero()[:, 0]
            if len(rows_N) == 0:
                break
            seen, tasks_N = observation.select(rows_N), tasks_B[rows_N]
            if isinstance(environment, GradualEnvironment):
                hand_in(environment, self._decided(seen, tasks_N, rows_N, decision))
                steps = iter([environment.end_step()])
            else:
                chosen = put(self.decide(seen, tasks_N, decision), rows_N, len(tasks_B))
                action = chosen[torch.arange(len(tasks_B), device=self.device).clamp(max=n - 1)]
                steps = map(environment.step, recorder.pieces(action))
            for step in steps:
                score.add(step)
                recorder.look()
                observation = step.observation
        families = environment.family_of(tasks_B)
        talks = [
            Talk.of(environment.transcript(slot)) if isinstance(environment, TalkingEnvironment) else None for slot in range(n)
        ]
        episodes = [
            Played(task, families[slot], instructions[slot], *score.of(slot), talks[slot], score.metrics_of(slot))
            for slot, task in enumerate(tasks)
        ]
        if reel is not None:
            recorder.save(episodes, reel)
        return episodes


def seats(task_ids_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Who sits where: the place [N] of each task among P batches of ``size`` seats, and the row in each seat: int64 [P, size].

    A task's seat is its id modulo ``size``; of those that want the same one, each goes to a batch of its own. Row 0 fills the
    empty seats.

    >>> place_N, occupant_PS = seats(torch.tensor([5, 6, 9]), 4)
    >>> place_N.tolist(), occupant_PS.tolist()
    ([1, 2, 5], [[0, 0, 1, 0], [0, 2, 0, 0]])
    """
    rows_N = torch.arange(len(task_ids_N), device=task_ids_N.device)
    seat_N = task_ids_N % size
    batch_N = one_hot(seat_N, size).cumsum(0)[rows_N, seat_N] - 1
    place_N = batch_N * size + seat_N
    occupant = place_N.new_zeros((int(batch_N.max()) + 1) * size)
    return place_N, occupant.index_copy_(0, place_N, rows_N).unflatten(0, (-1, size))


class _Score:
    """What the episode in each of B slots has come to."""

    def __init__(self, tasks_B: Tensor) -> None:
        self.return_B = torch.zeros(tasks_B.shape, dtype=torch.float64, device=tasks_B.device)
        self.steps_B = torch.zeros_like(tasks_B)
        self.done_B, self.success_B, self.truncated_B, self.lost_B = (
            torch.zeros_like(tasks_B, dtype=torch.bool) for _ in range(4)
        )
        self.metrics: dict[str, Tensor] = {}

    def add(self, step: Step) -> None:
        # Action by action, so that the sum is the same however a chunk is divided.
        for reward_B, valid_B in zip(step.rewards_BC.unbind(1), step.valid_BC.unbind(1), strict=True):
            counts_B = valid_B & ~self.done_B
            self.return_B += torch.where(counts_B, reward_B.double(), 0.0)
            self.steps_B += counts_B
        self.success_B = torch.where(self.done_B, self.success_B, step.metrics["success"] > 0.5)
        self.truncated_B = torch.where(self.done_B, self.truncated_B, step.truncated_B)
        self.lost_B = torch.where(self.done_B, self.lost_B, step.lost_B)
        for name, value_B in step.metrics.items():
            if name != "success":
                self.metrics[name] = torch.where(self.done_B, self.metrics.get(name, value_B), value_B)
        self.done_B = self.done_B | step.done_B

    def of(self, slot: int) -> tuple[Outcome, float, int]:
        outcome: Outcome = "success" if self.success_B[slot] else "timeout" if self.truncated_B[slot] else "failure"
        return ("lost" if self.lost_B[slot] else outcome), float(self.return_B[slot]), int(self.steps_B[slot])

    def metrics_of(self, slot: int) -> dict[str, float]:
        last = {name: float(value_B[slot]) for name, value_B in sorted(self.metrics.items())}
        return {name: value for name, value in last.items() if math.isfinite(value)}


class _Recorder(Protocol):
    """Keeps the episodes of some slots of an environment, of one round."""

    def look(self) -> None:
        """See how things stand: after the reset, and after every step."""
        ...

    def pieces(self, action: Action) -> Iterable[Action]:
        """What to execute one after the other, so that nothing is missed; together it is ``action``."""
        ...

    def save(self, episodes: list[Played], reel: Reel) -> None:
        """Those of the slots' episodes that were not lost."""
        ...


class _Nothing:
    """Of an environment that shows nothing."""

    def look(self) -> None: ...

    def pieces(self, action: Action) -> Iterable[Action]:
        return (action,)

    def save(self, episodes: list[Played], reel: Reel) -> None: ...


class _Notes(_Nothing):
    """Conversations are written down as they end: they stand until the next round."""

    def __init__(self, environment: TalkingEnvironment, slots: list[int]) -> None:
        self.environment, self.slots = environment, slots

    def save(self, episodes: list[Played], reel: Reel) -> None:
        for slot, episode, name in _kept(self.slots, episodes, reel):
            told = self.environment.transcript(slot)
            if told.shown or not reel.pictures_alone:
                write_conversation(reel.folder, name, told, {**reel.about, **episode.row()})


class _Film:
    """Videos, a frame for each action."""

    def __init__(self, environment: RenderEnvironment, slots: list[int]) -> None:
        self.environment, self.slots = environment, slots
        self.frames: list[Tensor] = []

    def look(self) -> None:
        self.frames.append(self.environment.render_video(torch.tensor(self.slots)).cpu())

    def pieces(self, action: Action) -> Iterable[Action]:
        return action.split(1, dim=1) if isinstance(action, Tensor) else (action,)

    def save(self, episodes: list[Played], reel: Reel) -> None:
        """A video of each slot's episode, and what there is to say about it."""
        reel.folder.mkdir(parents=True, exist_ok=True)
        seat = {slot: m for m, slot in enumerate(self.slots)}
        frames_TM = torch.stack(self.frames)
        for slot, episode, name in _kept(self.slots, episodes, reel):
            frames_T = frames_TM[: episode.steps + 1, seat[slot]]
            write_animation(reel.folder / f"{name}.webp", frames_T, fps=VIDEO_FPS, success=episode.outcome == "success")
            about = {**reel.about, **episode.row(), "video": f"{name}.webp"}
            atomic_write_text(reel.folder / f"{name}.json", json.dumps(about, indent=1) + "\n")


# What an environment can do -> who keeps its episodes; the first that fits, and only the first can keep pictures.
_RECORDERS: tuple[tuple[type, Callable[[Any, list[int]], _Recorder]], ...] = (
    (TalkingEnvironment, _Notes),
    (RenderEnvironment, _Film),
)


def _recorder(environment: Environment, slots: list[int], reel: Reel | None) -> _Recorder:
    known = _RECORDERS[:1] if reel is not None and reel.pictures_alone else _RECORDERS
    made = (make(environment, slots) for promise, make in known if slots and isinstance(environment, promise))
    return next(made, _Nothing())


def _kept(slots: list[int], episodes: list[Played], reel: Reel) -> Iterator[tuple[int, Played, str]]:
    """Slot, episode and file name of what is worth keeping."""
    for slot in slots:
        if episodes[slot].outcome != "lost":
            yield slot, episodes[slot], f"{reel.stem}-{episodes[slot].task_id}"
