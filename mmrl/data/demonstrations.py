"""Demonstrations by a simulator's scripted expert, as supervised examples.

``ScriptedDemonstrations`` records a fixed number of episodes once and draws from them for ever: few-shot imitation.
``ExpertStream`` never repeats itself: whenever its buffer is used up it plays new episodes, for pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.protocols import DataContext, Environment, ExpertEnvironment
from mmrl.types import Examples, Observation

_SPAN = 400_000  # of the first task ids of seeds: with the default ``first_task`` they stay below those of evaluations
HOPELESS = 1000  # failed demonstrations after which there is no point in waiting for a success


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Interruptions:
    """Bursts of random actions that throw the expert off its path, so that its demonstrations show how to come back.

    An expert that never errs never shows what to do after an error, and a policy that imitates it is lost after its first one
    (DAgger, Ross et al. 2011). Here the expert is disturbed while it acts, as in DART (Laskey et al. 2017), but by rare bursts
    instead of small noise at every step, and the bursts themselves are never imitated.
    """

    chance: float = Field(gt=0, lt=1)
    """Probability per action of the expert that a burst begins."""
    longest: int = Field(default=4, ge=1)
    """A burst is one random action held for 1 to this many steps, each number as likely."""


class _Disturber:
    """Which slots are interrupted now, and the random action each of them holds."""

    def __init__(self, interruptions: Interruptions, environment: Environment, generator: torch.Generator) -> None:
        self._interruptions, self._generator, spec = interruptions, generator, environment.action_spec
        self._low_A, self._high_A = torch.tensor(spec.low), torch.tensor(spec.high)
        self._left_B = torch.zeros(environment.num_envs, dtype=torch.long)
        self._held_BA = torch.zeros(environment.num_envs, spec.dim)

    def __call__(self, action_BA: Tensor) -> tuple[Tensor, Tensor]:
        """What is executed instead of the expert's action [B, A], and whether that is the expert's own [B]."""
        size, longest = len(self._left_B), self._interruptions.longest
        begins_B = torch.rand(size, generator=self._generator) < self._interruptions.chance
        begins_B &= self._left_B == 0
        spread_BA = torch.rand(self._held_BA.shape, generator=self._generator) * (self._high_A - self._low_A) + self._low_A
        length_B = torch.randint(1, longest + 1, (size,), generator=self._generator)
        self._held_BA = torch.where(begins_B[:, None], spread_BA, self._held_BA)
        self._left_B = torch.where(begins_B, length_B, self._left_B)
        own_B = (self._left_B == 0).to(action_BA.device)
        self._left_B = (self._left_B - 1).clamp(min=0)
        return torch.where(own_B[:, None], action_BA, self._held_BA.to(action_BA)), own_B


def record(
    environment: Environment,
    task_ids_B: Tensor,
    horizon: int,
    *,
    only_successes: bool,
    slots: int | None = None,
    interruptions: Interruptions | None = None,
    generator: torch.Generator | None = None,
) -> Examples:
    """One expert episode per slot: every moment with the ``horizon`` actions that followed it, slot by slot in time order.

    slots: keep the episodes of the first so many only (None: of all).
    interruptions: draw from ``generator`` (required with them).

    After an episode's end, or where an interruption begins, the last action repeats and the mask is False. An episode that
    the simulator lost is left out.
    """
    if not isinstance(environment, ExpertEnvironment):
        raise MMRLError(f"{type(environment).__name__} has no scripted expert; take demonstrations from a data set instead")
    disturb = None
    if interruptions is not None:
        assert generator is not None
        disturb = _Disturber(interruptions, environment, generator)
    observation = environment.reset(task_ids_B)
    seen, actions, valid = [], [], []
    while True:
        action_BA = environment.expert_action()
        executed_BA, own_B = (action_BA, True) if disturb is None else disturb(action_BA)
        step = environment.step(executed_BA[:, None])
        seen.append(observation)
        actions.append(action_BA)
        valid.append(step.valid_BC[:, 0] & own_B)
        observation = step.observation
        if len(seen) == environment.max_steps or bool(step.done_B.all()):
            break
    valid_BL = torch.stack(valid, 1)
    valid_BL &= ~step.lost_B[:, None]
    if slots is not None:
        valid_BL[slots:] = False
    if only_successes:
        valid_BL &= (step.metrics["success"] > 0.5)[:, None]
    slots_N, times_N = valid_BL.nonzero(as_tuple=True)
    window_NH = times_N[:, None] + torch.arange(horizon, device=times_N.device)
    last_N1 = _ends(valid_BL)[slots_N, times_N, None] - 1
    actions_NHA = torch.stack(actions, 1)[slots_N[:, None], window_NH.minimum(last_N1)]
    sentences = [moment.instructions for moment in seen]
    where = list(zip(slots_N.tolist(), times_N.tolist(), strict=True))
    state = None if seen[0].state is None else torch.stack([m.state for m in seen if m.state is not None], 1)[slots_N, times_N]
    images = {name: torch.stack([m.images[name] for m in seen], 1)[slots_N, times_N] for name in seen[0].images}
    return Examples(Observation(images, state, tuple(sentences[t][b] for b, t in where)), actions_NHA, window_NH <= last_N1)


def _ends(valid_BL: Tensor) -> Tensor:
    """For every moment the first one from it on that is not valid (L where all are): int64 [B, L]."""
    length = valid_BL.shape[1]
    place_BL = torch.arange(length, device=valid_BL.device).masked_fill(valid_BL, length)
    return place_BL.flip(1).cummin(1).values.flip(1)


def _record_all(environment: Environment, task_ids_M: Tensor, horizon: int, **options: Any) -> Examples:
    """``record`` each of M tasks once, a round of all slots at a time; the last round is filled up and the filling left out."""
    parts = []
    for tasks in task_ids_M.split(environment.num_envs):
        filled_B = torch.cat([tasks, tasks[-1:].expand(environment.num_envs - len(tasks))])
        parts.append(record(environment, filled_B, horizon, slots=len(tasks), **options))
    return Examples.concat(parts)


class ScriptedDemonstrations:
    """A fixed set of expert episodes."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.data.demonstrations:ScriptedDemonstrations`` block."""

        episodes: int = Field(gt=0)
        """Demonstrations to record."""
        first_task: int = 500_000
        """Task id of the first one."""
        num_envs: int | None = Field(default=None, gt=0)
        """Environments that record at once; null: one for each demonstration."""
        only_successes: bool = True
        """Leave failed demonstrations out."""
        environment: dict[str, Any] = field(default_factory=dict)
        """Overrides of the run's environment block."""
        interruptions: Interruptions | None = None
        """Random bursts that the expert recovers from; null: it is left alone."""

    def __init__(self, config: Config, *, context: DataContext) -> None:
        slots = min(config.num_envs or config.episodes, config.episodes)
        environment = context.make_environment(slots, config.environment)
        # Another seed of the run means other demonstrations, but never the episodes of an evaluation.
        first = config.first_task + context.seed * config.episodes % _SPAN
        tasks = torch.arange(first, first + config.episodes, device=context.device)
        self._generator = torch.Generator().manual_seed(context.seed)
        self._examples = _record_all(
            environment,
            tasks,
            context.horizon,
            only_successes=config.only_successes,
            interruptions=config.interruptions,
            generator=self._generator,
        )
        environment.close()
        if len(self._examples) == 0:
            raise MMRLError(
                "every scripted demonstration failed; raise the environment's time limit or set only_successes: false"
            )

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, size: int) -> Examples:
        return self._examples.select(torch.randint(len(self), (size,), generator=self._generator))

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])


class ExpertStream:
    """Endless fresh examples: whole rounds of expert episodes, shuffled in a buffer and used once."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.data.demonstrations:ExpertStream`` block."""

        num_envs: int = Field(default=256, gt=0)
        """Environments that run at once."""
        buffer: int = Field(default=16_384, gt=0)
        """Examples shuffled together, at least."""
        environment: dict[str, Any] = field(default_factory=dict)
        """Overrides of the run's environment block."""
        first_task: int = 2_000_000
        """Task id of the first episode."""
        interruptions: Interruptions | None = None
        """Random bursts that the expert recovers from; null: it is left alone."""

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self._config, self._context = config, context
        self._environment = context.make_environment(config.num_envs, config.environment)
        self._generator = torch.Generator().manual_seed(context.seed)
        self._next_task = config.first_task + context.seed * 100_000_000
        self._pool: Examples | None = None
        self._order, self._used = torch.zeros(0, dtype=torch.long), 0
        self._before_fill = self._cursor()

    def batch(self, size: int) -> Examples:
        parts: list[Examples] = []
        while (missing := size - sum(len(part) for part in parts)) > 0:
            if self._pool is None or self._used == len(self._order):
                self._fill()
            assert self._pool is not None
            taken = self._order[self._used : self._used + missing]
            self._used += len(taken)
            parts.append(self._pool.select(taken))
        return parts[0] if len(parts) == 1 else Examples.concat(parts)

    def _cursor(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state(), "next_task": torch.tensor(self._next_task)}

    def _fill(self) -> None:
        self._before_fill, first = self._cursor(), self._next_task
        parts: list[Examples] = []
        while (recorded := sum(len(part) for part in parts)) < self._config.buffer:
            if recorded == 0 and self._next_task - first >= HOPELESS:
                raise MMRLError(f"the scripted expert solved none of {HOPELESS} episodes; raise the environment's time limit")
            tasks = torch.arange(self._next_task, self._next_task + self._config.num_envs, device=self._context.device)
            self._next_task += self._config.num_envs
            parts.append(
                record(
                    self._environment,
                    tasks,
                    self._context.horizon,
                    only_successes=True,
                    interruptions=self._config.interruptions,
                    generator=self._generator,
                )
            )
        self._pool, self._used = Examples.concat(parts), 0
        self._order = torch.randperm(len(self._pool), generator=self._generator)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Where the buffer began and how much of it is used: loading plays the same episodes again."""
        return {**self._before_fill, "used": torch.tensor(-1 if self._pool is None else self._used)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
        self._next_task, used = int(state["next_task"]), int(state["used"])
        self._pool, self._before_fill = None, self._cursor()
        if used >= 0:
            self._fill()
            self._used = used
