"""The two halves of an ``AsyncEnvironment``'s calls, for a simulator that has no other process to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mmrl.types import Observation, Step


class AtOnce(Protocol):
    """Inherit it beside ``reset`` and ``step``: the first half then does all the work, and the second gives what came of it."""

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation: ...

    def step(self, actions_BCA: Tensor) -> Step: ...

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        observation = self.reset(task_ids_B, where_B)
        return lambda: observation

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        step = self.step(actions_BCA)
        return lambda: step
