"""One ManiSkill environment on the CPU, for a worker process."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch

from mmrl.workers.single import Description, Outcome, View
from simulators.maniskill_parts.experts import expert_action
from simulators.maniskill_parts.options import Options
from simulators.maniskill_parts.scene import Scene


class Single:
    """See ``mmrl.workers.single.SingleEnvironment``."""

    def __init__(self, options: Options) -> None:
        self._options, self._scene, self._age = options, Scene(options), 0
        images = {name: tuple(image.shape[1:3]) for name, image in self._scene.images().items()}
        self.description = Description(
            self._scene.action_spec,
            self._scene.max_steps,
            cameras=images,  # pyright: ignore[reportArgumentType]
            state_dim=self._scene.state().shape[1],
            metrics=self._scene.metric_names,
            families=(options.task,),
        )
        # ManiSkill collects garbage at every reset, and most of a reset is looking through what was imported: let it skip that.
        gc.freeze()

    def reset(self, task_id: int) -> str:
        self._age = 0
        return self._scene.reset([task_id])[0]

    def step(self, action_A: np.ndarray[Any, Any]) -> Outcome:
        self._age += 1
        result = self._scene.step(torch.from_numpy(action_A)[None])
        ended = bool(result.success_B) or bool(result.failed_B)
        late = not ended and self._age >= self._scene.max_steps
        return Outcome(float(result.reward_B), ended, late, {name: float(value) for name, value in result.metrics.items()})

    def observe(self) -> View:
        images = {name: image[0].numpy() for name, image in self._scene.images().items()}
        return View(images, self._scene.state()[0].numpy())

    def expert_action(self) -> np.ndarray[Any, Any]:
        options = self._options
        return expert_action(self._scene.env, options.task, options.control_mode, options.expert_speed)[0].numpy()

    def render(self) -> np.ndarray[Any, Any]:
        return self._scene.frame()[0].numpy() if self._options.render else np.zeros((2, 2, 3), np.uint8)

    def close(self) -> None:
        self._scene.close()
