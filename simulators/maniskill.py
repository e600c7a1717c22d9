"""ManiSkill: any of its registered tasks, simulated together on a GPU or one by one in worker processes on the CPU.

Tao et al. 2024 (arXiv 2410.00425). Observations are ManiSkill's cameras, joint positions and velocities with what else it shows a
policy that sees images (the hand's pose; for PickCube the goal, which no camera shows), and a sentence of the table in
``maniskill_parts/options.py``. An action is what the control mode makes of it, in [-1, 1] for those that move the hand by deltas.
An episode ends with ManiSkill's success or failure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrl.registry import resolve
from mmrl.types import Observation, Step
from mmrl.workers.environment import WorkerEnvironment
from simulators.maniskill_parts.options import Options

_SINGLE = "simulators.maniskill_parts.single:Single"
_BATCHED = "simulators.maniskill_parts.batched:Batched"  # imports ManiSkill, which on the CPU only the workers do


class ManiSkill:
    """The environment. Metrics: success, and the other yes-or-no that the task reports."""

    Config = Options

    def __init__(self, config: Options, *, num_envs: int, device: torch.device) -> None:
        self.config, self.num_envs = config, num_envs
        on_gpu = config.backend == "gpu" or (config.backend == "auto" and device.type == "cuda")
        self._inner = (
            resolve(_BATCHED)(config, num_envs=num_envs, device=device)
            if on_gpu
            else WorkerEnvironment(
                _SINGLE, config, num_envs=num_envs, device=device, workers=config.workers, time_limit=config.time_limit
            )
        )
        self.action_spec, self.max_steps = self._inner.action_spec, self._inner.max_steps

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        return self._inner.reset(task_ids_B, where_B)

    def step(self, actions_BCA: Tensor) -> Step:
        return self._inner.step(actions_BCA)

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        return self._inner.begin_reset(task_ids_B, where_B)

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        return self._inner.begin_step(actions_BCA)

    def expert_action(self) -> Tensor:
        """The scripted expert's next action in each slot: [B, A]. Raises MMRLError where the task has none."""
        return self._inner.expert_action()

    def render_video(self, index_M: Tensor) -> Tensor:
        """A large frame of each of the slots ``index_M``: uint8 [M, 256, 256, 3]."""
        return self._inner.render_video(index_M)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return (self.config.task,) * len(task_ids_M)

    def close(self) -> None:
        self._inner.close()
