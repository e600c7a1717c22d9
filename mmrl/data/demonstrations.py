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

HOPELESS = 1000  # failed demonstrations after which there is no point in waiting for a success


def record(
    environment: Environment, task_ids_B: Tensor, horizon: int, *, only_successes: bool, slots: int | None = None
) -> Examples:
    """One expert episode per slot: every moment with the ``horizon`` actions that followed it, slot by slot in time order.

    slots: keep the episodes of the first so many only (None: of all).

    After an episode's end the last action repeats and the mask is False. An episode that the simulator lost is left out.
    """
    if not isinstance(environment, ExpertEnvironment):
        raise MMRLError(f"{type(environment).__name__} has no scripted expert; take demonstrations from a data set instead")
    observation = environment.reset(task_ids_B)
    seen, actions, valid = [], [], []
    for _ in range(environment.max_steps):
        action_BA = environment.expert_action()
        step = environment.step(action_BA[:, None])
        seen.append(observation)
        actions.append(action_BA)
        valid.append(step.valid_BC[:, 0])
        observation = step.observation
        if bool(step.done_B.all()):
            break
    valid_BL = torch.stack(valid, 1)
    valid_BL &= ~step.lost_B[:, None]
    if slots is not None:
        valid_BL[slots:] = False
    if only_successes:
        valid_BL &= (step.metrics["success"] > 0.5)[:, None]
    slots_N, times_N = valid_BL.nonzero(as_tuple=True)
    window_NH = times_N[:, None] + torch.arange(horizon, device=times_N.device)
    last_N1 = valid_BL.sum(1)[slots_N, None] - 1
    actions_NHA = torch.stack(actions, 1)[slots_N[:, None], window_NH.minimum(last_N1)]
    sentences = [moment.instructions for moment in seen]
    where = list(zip(slots_N.tolist(), times_N.tolist(), strict=True))
    state = None if seen[0].state is None else torch.stack([m.state for m in seen if m.state is not None], 1)[slots_N, times_N]
    images = {name: torch.stack([m.images[name] for m in seen], 1)[slots_N, times_N] for name in seen[0].images}
    return Examples(Observation(images, state, tuple(sentences[t][b] for b, t in where)), actions_NHA, window_NH <= last_N1)


def _record_all(environment: Environment, task_ids_M: Tensor, horizon: int, *, only_successes: bool) -> Examples:
    """``record`` each of M tasks once, a round of all slots at a time; the last round is filled up and the filling left out."""
    parts = []
    for tasks in task_ids_M.split(environment.num_envs):
        filled_B = torch.cat([tasks, tasks[-1:].expand(environment.num_envs - len(tasks))])
        parts.append(record(environment, filled_B, horizon, only_successes=only_successes, slots=len(tasks)))
    return concat(parts)


def concat(parts: list[Examples]) -> Examples:
    """One after the other."""
    return Examples(
        Observation.concat([part.observation for part in parts]),
        torch.cat([part.actions_BHA for part in parts]),
        torch.cat([part.mask_BH for part in parts]),
    )


def rows(examples: Examples, index_N: Tensor) -> Examples:
    return Examples(examples.observation.select(index_N), examples.actions_BHA[index_N], examples.mask_BH[index_N])


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

    def __init__(self, config: Config, *, context: DataContext) -> None:
        slots = min(config.num_envs or config.episodes, config.episodes)
        environment = context.make_environment(slots, config.environment)
        # Another seed of the run means other demonstrations.
        first = config.first_task + context.seed * config.episodes
        tasks = torch.arange(first, first + config.episodes, device=context.device)
        self._examples = _record_all(environment, tasks, context.horizon, only_successes=config.only_successes)
        environment.close()
        if len(self._examples) == 0:
            raise MMRLError(
                "every scripted demonstration failed; raise the environment's time limit or set only_successes: false"
            )
        self._generator = torch.Generator().manual_seed(context.seed)

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, size: int) -> Examples:
        return rows(self._examples, torch.randint(len(self), (size,), generator=self._generator))

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
            parts.append(rows(self._pool, taken))
        return parts[0] if len(parts) == 1 else concat(parts)

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
            parts.append(record(self._environment, tasks, self._context.horizon, only_successes=True))
        self._pool, self._used = concat(parts), 0
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
