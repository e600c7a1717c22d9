"""Any gymnasium environment by id: all in this process, in gymnasium's own ``SyncVectorEnv``, or in supervised worker processes.

A task id becomes the seed of its episode's reset, so an episode is the same in any slot, with and without workers, bit for bit.
What differs by nature: workers may lose an episode (``Step.lost_B``), a slot that was never reset has the instruction "-" with
them, and a frame of a slot that is done shows its end; without them it may show an episode that gymnasium began by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrl.registry import resolve
from mmrl.types import Observation, Step
from mmrl.workers.environment import WorkerEnvironment
from simulators.gymnasium_parts.options import Options

_SINGLE = "simulators.gymnasium_parts.single:Single"
_BATCHED = "simulators.gymnasium_parts.batched:Batched"  # imports gymnasium, which otherwise only the workers do


class Gymnasium:
    """See the module. Built as ``Gymnasium(config, num_envs=8, device=torch.device("cpu"))``.

    Observations: a Box of uint8 [height, width, 3] is the image ``camera``, every other Box the ``state``, flat, float32 [B, S];
    other spaces go through gymnasium's FlattenObservation (Discrete becomes one-hot). Actions: Box, clipped to its bounds as
    CleanRL does; Discrete and MultiDiscrete, as whole numbers from 0. Metrics: success (see ``success_return``).
    """

    Config = Options

    def __init__(self, config: Options, *, num_envs: int, device: torch.device) -> None:
        self.config, self.num_envs = config, num_envs
        self._inner = (
            WorkerEnvironment(
                _SINGLE, config, num_envs=num_envs, device=device, workers=config.workers, time_limit=config.time_limit
            )
            if config.workers
            else resolve(_BATCHED)(config, num_envs=num_envs, device=device)
        )
        self.action_spec, self.max_steps = self._inner.action_spec, self._inner.max_steps
        if config.render:
            self.render_video = self._inner.render_video  # without it this is no RenderEnvironment

    @staticmethod
    def simulates_apart(config: Options) -> bool:
        return config.workers > 0

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        """Start these episodes in the slots where ``where_B`` is True (None: all); observations of all slots."""
        return self._inner.reset(task_ids_B, where_B)

    def step(self, actions_BCA: Tensor) -> Step:
        """Execute C actions per slot. Slots that are done ignore actions. Raises ValueError for what is no action."""
        return self._inner.step(actions_BCA)

    def begin_reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Callable[[], Observation]:
        return self._inner.begin_reset(task_ids_B, where_B)

    def begin_step(self, actions_BCA: Tensor) -> Callable[[], Step]:
        return self._inner.begin_step(actions_BCA)

    def family_of(self, task_ids_M: Tensor) -> tuple[str, ...]:
        return (self.config.id,) * len(task_ids_M)

    def close(self) -> None:
        self._inner.close()
