"""What a simulator gives to be run in worker processes: a class for one environment that speaks numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mmrl.types import ActionSpec


@dataclass(frozen=True)
class Description:
    """What every environment of one class and config has in common.

    cameras: name -> (height, width). state_dim: numbers in the state, 0 where there is none. metrics: the names in every Outcome.
    families: task id i is reported as ``families[i % len(families)]``.
    """

    action_spec: ActionSpec
    max_steps: int
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    state_dim: int = 0
    metrics: tuple[str, ...] = ("success",)
    families: tuple[str, ...] = ("task",)


@dataclass(frozen=True)
class View:
    """What one environment shows: camera name -> uint8 [height, width, 3], and float32 [S] or None."""

    images: Mapping[str, np.ndarray[Any, Any]]
    state: np.ndarray[Any, Any] | None


@dataclass(frozen=True)
class Outcome:
    """What one action led to; terminated and truncated are never both True, ``success`` is among the metrics."""

    reward: float
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float]


class SingleEnvironment(Protocol):
    """One environment. Built as ``cls(config)`` in a worker process, where several may live side by side.

    A task id and the config determine an episode completely. ``observe`` is called once a chunk, ``step`` once an action, so that
    nothing is rendered in between.
    """

    description: Description

    def reset(self, task_id: int) -> str:
        """Start an episode; its instruction."""
        ...

    def step(self, action_A: np.ndarray[Any, Any]) -> Outcome: ...

    def observe(self) -> View: ...

    def expert_action(self) -> np.ndarray[Any, Any]:
        """The scripted expert's next action [A]; raises MMRLError where the task has no expert."""
        ...

    def render(self) -> np.ndarray[Any, Any]:
        """A frame for a person, of the same size every time: uint8 [height, width, 3]."""
        ...

    def close(self) -> None: ...
