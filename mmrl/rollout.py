"""Collecting experience: a policy and batched environments, decision by decision.

The slots of an environment run in lock-step. Several environments are a pipeline: the policy acts for one while the others
simulate, where they can do that beside it (AsyncEnvironment). An environment that takes actions as they come (GradualEnvironment)
is a pipeline by itself: the policy acts for a part of its slots while a thread finishes what it has decided for the part before
(AsyncPolicy) and hands it in.

Every rollout starts with fresh episodes, so that nothing but a task counter has to survive between iterations (and a resumed run
is the unbroken run, with any simulator). Within a rollout a slot whose episode ends either starts the next task at once
(auto-reset) or stays idle: nobody acts for it, and its decisions are marked invalid. An episode that the end of the rollout cuts
is bootstrapped from the critic, like a truncation. An episode that the simulator lost (Step.lost_B) counts for nothing: its
decisions are marked invalid.

Random numbers belong to an episode and the decisions in it (see ``mmrl.numerics.draws``). So the same tasks give the same
episodes, up to the rounding of matrix products, whatever number of slots and environments they are spread over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmrl.columns import Values, apply, cat, stack
from mmrl.numerics.draws import Draws
from mmrl.protocols import AsyncEnvironment, AsyncPolicy, Environment, GradualEnvironment, Policy
from mmrl.transcripts import TalkingEnvironment
from mmrl.types import Action, Decision, EpisodeRecord, Observation, Rollout, Step

ValueFunction = Callable[[Observation, Draws], Tensor]
Result = TypeVar("Result")
Finish = Callable[[], tuple[Result, Action]]  # what a decision came to, and what to execute
_ACTION, _VALUE = 0, 1  # what an episode's random numbers are for
_BY_SLOT = ("_TB", "_TBV", "_TBK", "_TBKD")  # how the names of a rollout's fields end that hold the decisions of slots


@dataclass
class _Column:
    """One decision of all slots, as it is recorded."""

    decision: Decision
    step: Step
    valid_B: Tensor
    task_ids_B: Tensor
    final_values_B: Tensor
    anchors_B: Tensor | None


class _EpisodeLog:
    """Return and length of the running episode in each slot of ``environment``, and the finished ones."""

    def __init__(self, environment: Environment, device: torch.device) -> None:
        num_envs = environment.num_envs
        self.transcript = environment.transcript if isinstance(environment, TalkingEnvironment) else None
        self.returns_B = torch.zeros(num_envs, device=device)
        self.lengths_B = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.finished: list[EpisodeRecord] = []
        self.first_B = torch.zeros_like(self.lengths_B)  # the decision with which the running episode began
        self.lost: list[tuple[int, int, int]] = []  # (slot, first decision, last decision)

    def add(self, t: int, step: Step, valid_B: Tensor, ended_B: Tensor, task_ids_B: Tensor) -> None:
        self.returns_B += (step.rewards_BC * step.valid_BC).sum(1) * valid_B
        self.lengths_B += step.valid_BC.sum(1) * valid_B
        self.lost += [(slot, int(self.first_B[slot]), t) for slot in (ended_B & step.lost_B).nonzero()[:, 0].tolist()]
        self.finish(t, step, ended_B & ~step.lost_B, task_ids_B)
        self.first_B = torch.where(ended_B, t + 1, self.first_B)
        self.returns_B = torch.where(ended_B, 0.0, self.returns_B)
        self.lengths_B = torch.where(ended_B, 0, self.lengths_B)

    def finish(self, t: int, step: Step, ended_B: Tensor, task_ids_B: Tensor) -> None:
        """Record the episodes of the slots ``ended_B``, of which decision ``t`` was the last."""
        slots_M = ended_B.nonzero()[:, 0]
        metrics = {name: value[ended_B] for name, value in step.metrics.items() if name != "success"}
        success = step.metrics["success"][ended_B]
        spans_M3 = torch.stack([slots_M, self.first_B[ended_B], torch.full_like(slots_M, t)], 1)
        transcripts = () if self.transcript is None else tuple(self.transcript(slot) for slot in slots_M.tolist())
        values = task_ids_B[ended_B], self.returns_B[ended_B], success, self.lengths_B[ended_B]
        self.finished.append(EpisodeRecord(*values, metrics, spans_M3, transcripts))

    def record(self) -> EpisodeRecord:
        """The finished episodes, slot by slot."""
        whole = EpisodeRecord.concat(self.finished)
        assert whole.spans_M3 is not None
        return whole.select(whole.spans_M3[:, 0].argsort(stable=True))


class Collector:
    """Collects rollouts of ``decisions`` decisions from every slot of ``environments``.

    The environments' slots, one environment's after the other's, are the slots of the rollout.

    seed: of the random numbers. group_size: consecutive slots of an environment that play the same task. auto_reset: start the
    next task in a slot as soon as its episode ends (needs group_size 1). keep_means: keep the means of Gaussian units, where the
    policy gives them; they are large. pieces: parts of an environment's slots for which the policy acts one after the other; more
    than one needs GradualEnvironments. ``next_task`` is the only state; checkpoint it.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        *,
        decisions: int,
        seed: int,
        device: torch.device,
        group_size: int = 1,
        auto_reset: bool = True,
        keep_means: bool = False,
        pieces: int = 1,
    ) -> None:
        if auto_reset and group_size > 1:
            raise ValueError("auto_reset mixes episodes of different tasks into a group; use it with group_size 1")
        for environment in environments:
            if environment.num_envs % group_size:
                raise ValueError(f"group_size is {group_size}, which does not divide the {environment.num_envs} environments")
        self.environments, self.decisions = environments, decisions
        self.seed, self.device = seed, device
        self.group_size, self.auto_reset, self.keep_means = group_size, auto_reset, keep_means
        self.pieces = pieces
        self.next_task = 0

    def take_tasks(self, count: int) -> Tensor:
        """Ids of ``count`` tasks that nobody has played: int64 [count]."""
        tasks = torch.arange(self.next_task, self.next_task + count, device=self.device)
        self.next_task += count
        return tasks

    @torch.no_grad()
    def collect(self, policy: Policy, value: ValueFunction | None = None) -> Rollout:
        """``value`` is the critic for the bootstraps (None: every value is 0)."""
        parts = [_Part(self, environment, policy, value) for environment in self.environments]
        for _ in range(self.decisions):
            for part in parts:
                part.follow()  # waits for this part alone
                part.decide()
        return join([part.rollout() for part in parts])


class _Part:
    """The slots of one environment during one rollout: ``decide`` and ``follow`` in turns, then ``rollout``."""

    def __init__(self, collector: Collector, environment: Environment, policy: Policy, value: ValueFunction | None) -> None:
        self._collector, self._environment, self._policy, self._value = collector, environment, policy, value
        size, device = environment.num_envs, collector.device
        self._copies_B = torch.arange(size, device=device) % collector.group_size
        self._tasks_B = collector.take_tasks(size // collector.group_size).repeat_interleave(collector.group_size)
        self._ages_B = torch.zeros_like(self._tasks_B)  # decisions in the running episodes
        self._running_B = torch.ones(size, dtype=torch.bool, device=device)
        self._observe = _begin_reset(environment, self._tasks_B)  # waits for what the next decision sees
        self._log, self._columns = _EpisodeLog(environment, device), []
        self._pending: tuple[Decision, Tensor | None, Callable[[], Step]] | None = None

    def decide(self) -> None:
        """Act in the slots that run, and let the environment begin with what follows."""
        if not bool(self._running_B.any()):
            return
        observation, draws = self._timed(self._observe()), self._draws(_ACTION)
        begin = self._in_pieces if self._collector.pieces > 1 else self._at_once
        decision, wait = begin(observation, draws)
        self._pending = decision, observation.anchors_B, wait

    def _at_once(self, observation: Observation, draws: Draws) -> tuple[Decision, Callable[[], Step]]:
        """Act in all slots that run, then step."""
        if bool(self._running_B.all()):
            decision = self._policy.act(observation, draws, explore=True)
        else:
            rows = self._running_B.nonzero()[:, 0]
            decision = self._policy.act(observation.select(rows), draws.select(rows), explore=True)
            decision = decision.spread(rows, len(self._running_B))
        return decision, _begin_step(self._environment, decision.action)

    def _in_pieces(self, observation: Observation, draws: Draws) -> tuple[Decision, Callable[[], Step]]:
        """Act in the slots of one piece after the other, while what was decided before is finished and handed in."""
        environment: Any = self._environment
        slots_B = torch.arange(len(self._running_B), device=self._running_B.device)
        pieces = slots_B.split(-(-len(slots_B) // self._collector.pieces))
        running = [rows for slots in pieces if len(rows := slots[self._running_B[slots]])]

        def decided() -> Iterator[tuple[Finish[Decision], Tensor]]:
            for rows in running:
                finish = begin_act(self._policy, observation.select(rows), draws.select(rows), explore=True)
                yield lambda finish=finish: ((decision := finish()), decision.action), rows

        decision = Decision.concat(hand_in(environment, decided()))
        rows = torch.cat(running)
        return decision if len(rows) == len(slots_B) else decision.spread(rows, len(slots_B)), environment.end_step

    def follow(self) -> None:
        """See what followed the last decision, if there was one."""
        if self._pending is None:
            return
        decision, anchors_B, wait = self._pending
        self._pending, step = None, wait()
        t, running_B = len(self._columns), self._running_B
        ended_B = step.done_B & running_B
        self._log.add(t, step, running_B, ended_B, self._tasks_B)
        self._ages_B = self._ages_B + 1
        final_values_B = self._values_of(step.observation, ended_B & step.truncated_B)
        kept = decision if self._collector.keep_means else replace(decision, means_BKD=None)
        self._columns.append(_Column(kept, step, running_B, self._tasks_B, final_values_B, anchors_B))
        self._observe = lambda: step.observation
        if not self._collector.auto_reset:
            self._running_B = running_B & ~ended_B
        elif t + 1 < self._collector.decisions and bool(ended_B.any()):
            self._restart(ended_B)

    def _restart(self, ended_B: Tensor) -> None:
        self._tasks_B = self._tasks_B.clone()
        self._tasks_B[ended_B] = self._collector.take_tasks(int(ended_B.sum()))
        self._ages_B = torch.where(ended_B, 0, self._ages_B)
        self._observe = _begin_reset(self._environment, self._tasks_B, ended_B)

    def rollout(self) -> Rollout:
        """What was recorded, when the last decision has been followed."""
        self.follow()
        last = self._columns[-1].step
        last_values_B = self._values_of(last.observation, self._running_B & ~last.done_B)
        if not self._collector.auto_reset:  # whole episodes were asked for: one that was cut is recorded as it stands
            self._log.finish(len(self._columns) - 1, last, self._running_B & ~last.done_B, self._tasks_B)
        return _assemble(self._columns, last_values_B, self._log)

    def _timed(self, observation: Observation) -> Observation:
        return replace(observation, elapsed_B=self._ages_B)

    def _draws(self, purpose: int) -> Draws:
        return Draws.of(self._collector.seed, self._tasks_B, self._copies_B, self._ages_B, purpose)

    def _values_of(self, observation: Observation, where_B: Tensor) -> Tensor:
        """The critic's estimate in the slots ``where_B``, 0 elsewhere."""
        values_B = torch.zeros(where_B.shape, device=where_B.device)
        if self._value is not None and bool(where_B.any()):
            rows = where_B.nonzero().squeeze(1)
            values_B[rows] = self._value(self._timed(observation).select(rows), self._draws(_VALUE).select(rows)).to(
                values_B.dtype
            )
        return values_B


def _begin_reset(environment: Environment, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
    """The function that waits for the observations."""
    if isinstance(environment, AsyncEnvironment):
        return environment.begin_reset(task_ids_B, where_B)
    observation = environment.reset(task_ids_B, where_B)
    return lambda: observation


def begin_act(policy: Policy, observation: Observation, draws: Draws, *, explore: bool) -> Callable[[], Decision]:
    """The function that finishes the decision."""
    if isinstance(policy, AsyncPolicy):
        return policy.begin_act(observation, draws, explore=explore)
    decision = policy.act(observation, draws, explore=explore)
    return lambda: decision


def hand_in(environment: GradualEnvironment, decided: Iterable[tuple[Finish[Result], Tensor]]) -> list[Result]:
    """Hand in each decision for its slots (int64 [N]) when it is finished, which a thread does while the next one is made.

    decided: the functions that finish them. Returns what these give, beside the actions.
    """

    def finished(finish: Finish[Result], rows_N: Tensor) -> Result:
        result, action = finish()
        environment.hand_in(action, rows_N)
        return result

    with ThreadPoolExecutor(1, "handing in") as beside:
        handed = [beside.submit(finished, finish, rows_N) for finish, rows_N in decided]
    return [each.result() for each in handed]


def _begin_step(environment: Environment, actions: Action) -> Callable[[], Step]:
    """The function that waits for what follows."""
    if isinstance(environment, AsyncEnvironment):
        return environment.begin_step(actions)
    step = environment.step(actions)
    return lambda: step


def _assemble(columns: Sequence[_Column], last_values_B: Tensor, log: _EpisodeLog) -> Rollout:
    values_TBV = torch.stack([_values(c.decision) for c in columns])
    done_TB = torch.stack([c.step.done_B for c in columns])
    following_TB = torch.cat([values_TBV[1:, :, 0], last_values_B[None]])
    final_TB = torch.stack([c.final_values_B for c in columns])
    valid_TB = torch.stack([c.valid_B for c in columns])
    for slot, first_t, last_t in log.lost:
        valid_TB[first_t : last_t + 1, slot] = False
    rewards_TB = torch.stack([(c.step.rewards_BC * c.step.valid_BC).sum(1) for c in columns])
    return Rollout(
        trace={name: stack([c.decision.trace[name] for c in columns]) for name in columns[0].decision.trace},
        log_probs_TBK=torch.stack([c.decision.log_probs_BK for c in columns]),
        mask_TBK=torch.stack([c.decision.mask_BK for c in columns]),
        rewards_TB=rewards_TB * valid_TB,
        values_TBV=values_TBV,
        next_values_TB=torch.where(done_TB, final_TB, following_TB),
        valid_TB=valid_TB,
        terminated_TB=torch.stack([c.step.terminated_B for c in columns]),
        truncated_TB=torch.stack([c.step.truncated_B for c in columns]),
        task_ids_TB=torch.stack([c.task_ids_B for c in columns]),
        episodes=log.record(),
        env_steps=sum(int((c.step.valid_BC & c.valid_B[:, None]).sum()) for c in columns),
        lost=len(log.lost),
        anchor_TB=None if columns[0].anchors_B is None else torch.stack([_anchors(c) for c in columns]),
        means_TBKD=None if columns[0].decision.means_BKD is None else torch.stack([_means(c) for c in columns]),
    )


def _anchors(column: _Column) -> Tensor:
    assert column.anchors_B is not None  # an environment gives keys always or never
    return column.anchors_B


def _means(column: _Column) -> Tensor:
    assert column.decision.means_BKD is not None  # a policy gives means always or never
    return column.decision.means_BKD


def _values(decision: Decision) -> Tensor:
    """The critic's, or zeros."""
    nothing_B1 = torch.zeros(len(decision.mask_BK), 1, device=decision.mask_BK.device)
    return nothing_B1 if decision.values_BV is None else decision.values_BV


def join(parts: Sequence[Rollout]) -> Rollout:
    """Side by side; what is shorter than the longest is filled up with decisions that are not valid.

    Episodes are in the order of their tasks, and those of one task in the order of their slots.
    """
    longest = max(len(part.rewards_TB) for part in parts)

    def fill(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])]) if len(x) < longest else x

    def side_by_side(values: Sequence[Values]) -> Values:
        filled = [apply(x, fill) for x in values]
        return filled[0] if len(filled) == 1 else cat(filled, 1)

    tensors = {
        f.name: side_by_side([getattr(part, f.name) for part in parts])
        for f in fields(Rollout)
        if f.name.endswith(_BY_SLOT) and getattr(parts[0], f.name) is not None
    }
    before = [sum(part.rewards_TB.shape[1] for part in parts[:index]) for index in range(len(parts))]
    episodes = EpisodeRecord.concat([_shifted(part.episodes, slots) for part, slots in zip(parts, before, strict=True)])
    return Rollout(
        trace={name: side_by_side([part.trace[name] for part in parts]) for name in parts[0].trace},
        **tensors,
        episodes=episodes.select(episodes.task_ids_M.argsort(stable=True)),
        env_steps=sum(part.env_steps for part in parts),
        lost=sum(part.lost for part in parts),
    )


def _shifted(episodes: EpisodeRecord, slots: int) -> EpisodeRecord:
    """The same episodes, so many slots further on."""
    assert episodes.spans_M3 is not None
    return replace(episodes, spans_M3=episodes.spans_M3 + episodes.spans_M3.new_tensor([slots, 0, 0]))


def of_slots(rollout: Rollout, keep_B: Tensor) -> Rollout:
    """A rollout of whole episodes, one in each slot and none where it was lost, without the slots that keep_B leaves out.

    env_steps and lost are those of the slots that stay.
    """
    played_B = rollout.valid_TB.any(0)
    index_N = keep_B.nonzero()[:, 0]
    tensors = {
        f.name: getattr(rollout, f.name)[:, index_N]
        for f in fields(Rollout)
        if f.name.endswith(_BY_SLOT) and getattr(rollout, f.name) is not None
    }
    episodes = rollout.episodes.select(keep_B[played_B].nonzero()[:, 0])
    assert episodes.spans_M3 is not None
    slots_M = keep_B.cumsum(0)[episodes.spans_M3[:, 0]] - 1  # where their slots are now
    episodes = replace(episodes, spans_M3=torch.cat([slots_M[:, None], episodes.spans_M3[:, 1:]], 1))
    return replace(
        rollout,
        trace={name: apply(values, lambda x: x[:, index_N]) for name, values in rollout.trace.items()},
        **tensors,
        episodes=episodes,
        env_steps=int(episodes.lengths_M.sum()),
        lost=int((keep_B & ~played_B).sum()),
    )


def episode_metrics(record: EpisodeRecord) -> Mapping[str, float]:
    """Means over the finished episodes, under ``rollout/``."""
    if record.task_ids_M.numel() == 0:
        return {"rollout/episodes": 0.0}
    means = {
        "rollout/success": record.success_M.float().mean(),
        "rollout/return": record.returns_M.mean(),
        "rollout/length": record.lengths_M.float().mean(),
        **{f"rollout/{name}": value.float().nanmean() for name, value in record.metrics.items()},
    }
    return {"rollout/episodes": float(record.task_ids_M.numel()), **{name: float(value) for name, value in means.items()}}
