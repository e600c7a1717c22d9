"""Collecting experience: a policy and a batched environment, decision by decision, in lock-step.

Every rollout starts with fresh episodes, so that nothing but a task counter has to survive between iterations (and a resumed run
is the unbroken run, with any simulator). Within a rollout a slot whose episode ends either starts the next task at once
(auto-reset) or stays idle, its decisions marked invalid. An episode that the end of the rollout cuts is bootstrapped from the
critic, like a truncation. An episode that the simulator lost (Step.lost_B) counts for nothing: its decisions are marked invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.protocols import Environment, Policy
from mmrl.types import Decision, EpisodeRecord, Observation, Rollout, Step

ValueFunction = Callable[[Observation, torch.Generator], Tensor]


@dataclass
class _Column:
    """One decision of all slots, as it is recorded."""

    decision: Decision
    step: Step
    valid_B: Tensor
    task_ids_B: Tensor
    final_values_B: Tensor


class _EpisodeLog:
    """Return and length of the running episode in each slot, and the finished ones."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self.returns_B = torch.zeros(num_envs, device=device)
        self.lengths_B = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.finished: list[EpisodeRecord] = []
        self.slots: list[Tensor] = []
        self.first_B = torch.zeros_like(self.lengths_B)  # the decision with which the running episode began
        self.lost: list[tuple[int, int, int]] = []  # (slot, first decision, last decision)

    def add(self, t: int, step: Step, valid_B: Tensor, ended_B: Tensor, task_ids_B: Tensor) -> None:
        self.returns_B += (step.rewards_BC * step.valid_BC).sum(1) * valid_B
        self.lengths_B += step.valid_BC.sum(1) * valid_B
        self.lost += [(slot, int(self.first_B[slot]), t) for slot in (ended_B & step.lost_B).nonzero()[:, 0].tolist()]
        self.finish(step, ended_B & ~step.lost_B, task_ids_B)
        self.first_B = torch.where(ended_B, t + 1, self.first_B)
        self.returns_B = torch.where(ended_B, 0.0, self.returns_B)
        self.lengths_B = torch.where(ended_B, 0, self.lengths_B)

    def finish(self, step: Step, ended_B: Tensor, task_ids_B: Tensor) -> None:
        if not bool(ended_B.any()):
            return
        metrics = {name: value[ended_B] for name, value in step.metrics.items() if name != "success"}
        success = step.metrics["success"][ended_B]
        self.finished.append(
            EpisodeRecord(task_ids_B[ended_B], self.returns_B[ended_B], success, self.lengths_B[ended_B], metrics)
        )
        self.slots.append(ended_B.nonzero().squeeze(1))


class Collector:
    """Collects rollouts of ``decisions`` decisions from every slot of ``environment``.

    group_size: consecutive slots that play the same task. auto_reset: start the next task in a slot as soon as its episode ends
    (needs group_size 1). ``next_task`` is the only state; checkpoint it.
    """

    def __init__(self, environment: Environment, *, decisions: int, group_size: int = 1, auto_reset: bool = True) -> None:
        if auto_reset and group_size > 1:
            raise ValueError("auto_reset mixes episodes of different tasks into a group; use it with group_size 1")
        if environment.num_envs % group_size:
            raise ValueError(f"group_size is {group_size}, which does not divide the {environment.num_envs} environments")
        self.environment, self.decisions = environment, decisions
        self.group_size, self.auto_reset = group_size, auto_reset
        self.next_task = 0

    def _take_tasks(self, count: int, device: torch.device) -> Tensor:
        tasks = torch.arange(self.next_task, self.next_task + count, device=device)
        self.next_task += count
        return tasks

    @torch.no_grad()
    def collect(self, policy: Policy, generator: torch.Generator, value: ValueFunction | None = None) -> Rollout:
        """``value`` is the critic for the bootstraps (None: every value is 0)."""
        env = self.environment
        device = generator.device
        tasks_B = self._take_tasks(env.num_envs // self.group_size, device).repeat_interleave(self.group_size)
        observation = env.reset(tasks_B)
        running_B = torch.ones(env.num_envs, dtype=torch.bool, device=device)
        log, columns = _EpisodeLog(env.num_envs, device), []
        for t in range(self.decisions):
            decision = policy.act(observation, generator, explore=True)
            step = env.step(decision.action_BCA)
            ended_B = step.done_B & running_B
            log.add(t, step, running_B, ended_B, tasks_B)
            final_values_B = _values_of(value, step.observation, ended_B & step.truncated_B, generator)
            columns.append(_Column(decision, step, running_B, tasks_B, final_values_B))
            observation = step.observation
            if self.auto_reset and t + 1 < self.decisions and bool(ended_B.any()):
                tasks_B = tasks_B.clone()
                tasks_B[ended_B] = self._take_tasks(int(ended_B.sum()), device)
                observation = env.reset(tasks_B, ended_B)
            elif not self.auto_reset:
                running_B = running_B & ~ended_B
                if not bool(running_B.any()):
                    break
        last_values_B = _values_of(value, observation, running_B & ~(columns[-1].step.done_B), generator)
        return _assemble(columns, last_values_B, log, num_envs=env.num_envs, ordered=not self.auto_reset)


def _values_of(value: ValueFunction | None, observation: Observation, where_B: Tensor, generator: torch.Generator) -> Tensor:
    """The critic's estimate in the slots ``where_B``, 0 elsewhere."""
    values_B = torch.zeros(where_B.shape, device=where_B.device)
    if value is not None and bool(where_B.any()):
        rows = where_B.nonzero().squeeze(1)
        values_B[rows] = value(observation.select(rows), generator).to(values_B.dtype)
    return values_B


def _assemble(columns: list[_Column], last_values_B: Tensor, log: _EpisodeLog, *, num_envs: int, ordered: bool) -> Rollout:
    first = columns[0].decision
    traces: dict[str, Tensor] = {name: torch.stack([c.decision.trace[name] for c in columns]) for name in first.trace}
    zero_B = torch.zeros(num_envs, device=first.action_BCA.device)
    values_TB = torch.stack([zero_B if c.decision.values_B is None else c.decision.values_B for c in columns])
    done_TB = torch.stack([c.step.done_B for c in columns])
    following_TB = torch.cat([values_TB[1:], last_values_B[None]])
    final_TB = torch.stack([c.final_values_B for c in columns])
    valid_TB = torch.stack([c.valid_B for c in columns])
    for slot, first_t, last_t in log.lost:
        valid_TB[first_t : last_t + 1, slot] = False
    rewards_TB = torch.stack([(c.step.rewards_BC * c.step.valid_BC).sum(1) for c in columns])
    return Rollout(
        trace=traces,
        log_probs_TBK=torch.stack([c.decision.log_probs_BK for c in columns]),
        mask_TBK=torch.stack([c.decision.mask_BK for c in columns]),
        rewards_TB=rewards_TB * valid_TB,
        values_TB=values_TB,
        next_values_TB=torch.where(done_TB, final_TB, following_TB),
        valid_TB=valid_TB,
        terminated_TB=torch.stack([c.step.terminated_B for c in columns]),
        truncated_TB=torch.stack([c.step.truncated_B for c in columns]),
        task_ids_TB=torch.stack([c.task_ids_B for c in columns]),
        episodes=_episodes(log, columns[-1], ordered=ordered),
        env_steps=sum(int((c.step.valid_BC & c.valid_B[:, None]).sum()) for c in columns),
        lost=len(log.lost),
    )


def _episodes(log: _EpisodeLog, last: _Column, *, ordered: bool) -> EpisodeRecord:
    """Finished episodes. Without auto-reset also the unfinished ones (their slots still run), and in the order of the slots: one
    for each, but for those whose episode was lost.
    """
    if ordered:
        log.finish(last.step, last.valid_B & ~last.step.done_B, last.task_ids_B)
    if not log.finished:
        return _empty(last)
    record = EpisodeRecord.concat(log.finished)
    return record.select(torch.cat(log.slots).argsort()) if ordered else record


def _empty(last: _Column) -> EpisodeRecord:
    nothing = torch.zeros(0, device=last.valid_B.device)
    metrics = {name: nothing for name in last.step.metrics if name != "success"}
    return EpisodeRecord(nothing.long(), nothing, nothing, nothing.long(), metrics)


def episode_metrics(record: EpisodeRecord) -> Mapping[str, float]:
    """Means over the finished episodes, under ``rollout/``."""
    if record.task_ids_M.numel() == 0:
        return {"rollout/episodes": 0.0}
    means = {
        "rollout/success": record.success_M.float().mean(),
        "rollout/return": record.returns_M.mean(),
        "rollout/length": record.lengths_M.float().mean(),
        **{f"rollout/{name}": value.float().mean() for name, value in record.metrics.items()},
    }
    return {"rollout/episodes": float(record.task_ids_M.numel()), **{name: float(value) for name, value in means.items()}}
