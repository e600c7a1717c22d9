"""ManiSkill on a GPU: all environments in one simulation, and observations that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.errors import MMRLError, refuse_other_actions
from mmrl.types import Observation, Step
from mmrl.workers.at_once import AtOnce
from simulators.maniskill_parts.experts import expert_action
from simulators.maniskill_parts.options import Options
from simulators.maniskill_parts.scene import Scene


class Batched(AtOnce):
    """``num_envs`` slots in lock-step.

    A slot that is done is simulated on, for PhysX knows no other way, but nobody sees it: what it showed at its end is kept.
    """

    def __init__(self, options: Options, *, num_envs: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        if not gpu and num_envs > 1:
            raise MMRLError("'environment.backend' is 'gpu', but the run's device is not; set it to 'cpu' or device to 'cuda'")
        self.options, self.num_envs, self.device = options, num_envs, device
        self._scene = Scene(options, num_envs=num_envs, gpu=gpu)
        self.action_spec, self.max_steps = self._scene.action_spec, self._scene.max_steps
        self._low_A, self._high_A = (torch.tensor(b, device=device) for b in (self.action_spec.low, self.action_spec.high))
        self._instructions = ["-"] * num_envs
        self._age_B = torch.zeros(num_envs, dtype=torch.long, device=device)
        self._ended_B, self._late_B = (torch.zeros(num_envs, dtype=torch.bool, device=device) for _ in range(2))
        self._metrics = {name: torch.zeros(num_envs, device=device) for name in self._scene.metric_names}
        self._shown: Observation | None = None

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        if task_ids_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per slot, shape ({self.num_envs},); got {tuple(task_ids_B.shape)}")
        where_B = torch.ones_like(task_ids_B, dtype=torch.bool) if where_B is None else where_B
        chosen_M = where_B.to(self.device).nonzero()[:, 0]
        tasks = task_ids_B.to(self.device)[chosen_M].tolist()
        if tasks:
            sentences = self._scene.reset(tasks, chosen_M if self.num_envs > 1 else None)
            for slot, sentence in zip(chosen_M.tolist(), sentences, strict=True):
                self._instructions[slot] = sentence
        for tensor in (self._age_B, self._ended_B, self._late_B, *self._metrics.values()):
            tensor[chosen_M] = 0
        return self._observe(frozen_B=self._ended_B | self._late_B)

    def step(self, actions_BCA: Tensor) -> Step:
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, self.action_spec.dim)
        actions_BCA = actions_BCA.detach().to(self.device, torch.float32).clamp(self._low_A, self._high_A)
        frozen_B = self._ended_B | self._late_B
        rewards, valid = [], []
        for c, action_BA in enumerate(actions_BCA.unbind(1)):
            running_B = ~(self._ended_B | self._late_B)
            valid.append(running_B)
            if not bool(running_B.any()):
                rewards.append(torch.zeros_like(running_B, dtype=torch.float32))
                continue
            result = self._scene.step(action_BA)
            self._age_B += running_B
            rewards.append(torch.where(running_B, result.reward_B, 0.0))
            self._ended_B = torch.where(running_B, result.success_B | result.failed_B, self._ended_B)
            self._late_B = torch.where(running_B, (self._age_B >= self.max_steps) & ~self._ended_B, self._late_B)
            for name, value_B in result.metrics.items():
                self._metrics[name] = torch.where(running_B, value_B, self._metrics[name])
            if c + 1 < actions_BCA.shape[1] and bool((running_B & (self._ended_B | self._late_B)).any()):
                self._observe(frozen_B)
                frozen_B = self._ended_B | self._late_B
        return Step(
            observation=self._observe(frozen_B),
            rewards_BC=torch.stack(rewards, 1),
            valid_BC=torch.stack(valid, 1),
            terminated_B=self._ended_B.clone(),
            truncated_B=self._late_B.clone(),
            metrics={name: value_B.clone() for name, value_B in self._metrics.items()},
        )

    def expert_action(self) -> Tensor:
        options = self.options
        return expert_action(self._scene.env, options.task, options.control_mode, options.expert_speed).to(self.device)

    def render_video(self, index_M: Tensor) -> Tensor:
        return self._scene.frame().to(self.device)[index_M.to(self.device)]

    def close(self) -> None:
        self._scene.close()

    def _observe(self, frozen_B: Tensor) -> Observation:
        """What the slots show; those that were done before keep what they showed."""
        images = {name: image.to(self.device).clone() for name, image in self._scene.images().items()}
        state_BS = self._scene.state().to(self.device)
        if self._shown is not None and bool(frozen_B.any()):
            for name, image in images.items():
                image[frozen_B] = self._shown.images[name][frozen_B]
            assert self._shown.state is not None
            state_BS[frozen_B] = self._shown.state[frozen_B]
        self._shown = Observation(images, state_BS, tuple(self._instructions))
        return self._shown
