"""gymnasium environments in this process, one after the other: its ``SyncVectorEnv``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import create_empty_array
from torch import Tensor

from mmrl.errors import refuse_other_actions, refuse_other_choices
from mmrl.types import Observation, Step
from mmrl.workers.at_once import AtOnce
from simulators.gymnasium_parts.making import CAMERA, SUCCESS_KEYS, Array, facts_of, make, native, seed_of
from simulators.gymnasium_parts.options import Options


class Batched(AtOnce):
    """``num_envs`` slots in lock-step.

    gymnasium restarts an environment by itself at the step after its end; what it shows from then on is ignored until the slot is
    reset here.
    """

    def __init__(self, options: Options, *, num_envs: int, device: torch.device) -> None:
        self._options, self.num_envs, self._device = options, num_envs, device
        self._vector = SyncVectorEnv([partial(make, options)] * num_envs, copy=False)
        self._facts = facts_of(options, self._vector.envs[0])
        self.action_spec, self.max_steps = self._facts.action_spec, self._facts.max_steps
        self._seen: Any = create_empty_array(self._vector.single_observation_space, num_envs)  # of each slot's own episode
        self._begun = False
        self._return_B = np.zeros(num_envs)
        self._terminated_B, self._truncated_B = np.zeros(num_envs, bool), np.ones(num_envs, bool)
        self._success_B = np.zeros(num_envs, bool)

    def reset(self, task_ids_B: Tensor, where_B: Tensor | None = None) -> Observation:
        if task_ids_B.shape != (self.num_envs,):
            raise ValueError(f"reset needs one task id per environment, shape ({self.num_envs},); got {tuple(task_ids_B.shape)}")
        chosen_B = np.ones(self.num_envs, bool) if where_B is None else where_B.cpu().numpy().astype(bool)
        if chosen_B.any():
            seeds: Any = [seed_of(task, self._options.seed) for task in task_ids_B.tolist()]
            # None may be left out of the first: gymnasium steps, and shows, all of them.
            mask_B = chosen_B.copy() if self._begun else np.ones(self.num_envs, bool)
            seen, _ = self._vector.reset(seed=seeds, options={"reset_mask": mask_B})
            self._begun = True
            self._seen[chosen_B] = seen[chosen_B]
            for state in (self._return_B, self._terminated_B, self._truncated_B, self._success_B):
                state[chosen_B] = 0
        return self._observe()

    def step(self, actions_BCA: Tensor) -> Step:
        spec = self.action_spec
        refuse_other_actions(tuple(actions_BCA.shape), self.num_envs, spec.dim)
        actions = actions_BCA.detach().cpu().float().numpy()
        if spec.discrete:
            refuse_other_choices(actions[~(self._terminated_B | self._truncated_B)], spec.low, spec.high)
        rewards, valid = [], []
        for action_BA in actions.swapaxes(0, 1):
            alive_B = ~(self._terminated_B | self._truncated_B)
            rewards.append(self._advance(action_BA, alive_B) if alive_B.any() else np.zeros(self.num_envs))
            valid.append(alive_B)
        return Step(
            observation=self._observe(),
            rewards_BC=self._tensor(np.stack(rewards, 1), torch.float32),
            valid_BC=self._tensor(np.stack(valid, 1)),
            terminated_B=self._tensor(self._terminated_B),
            truncated_B=self._tensor(self._truncated_B),
            metrics={"success": self._tensor(self._success_B, torch.float32)},
        )

    def render_video(self, index_M: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(self._vector.envs[i].render()) for i in index_M.tolist()]))

    def close(self) -> None:
        self._vector.close()

    def _advance(self, action_BA: Array, alive_B: Array) -> Array:
        """One action in every slot that is not done, and one that is valid in those that are; the rewards [B]."""
        still_A = np.clip(0.0, self.action_spec.low, self.action_spec.high).astype(np.float32)
        taken = native(self._vector.single_action_space, np.where(alive_B[:, None], action_BA, still_A))
        seen, reward_B, terminated_B, truncated_B, info = self._vector.step(taken)
        reward_B = np.where(alive_B, reward_B, 0.0)
        self._seen[alive_B] = seen[alive_B]
        self._return_B += reward_B
        self._terminated_B |= alive_B & terminated_B
        self._truncated_B |= alive_B & truncated_B & ~terminated_B
        self._success_B = np.where(alive_B, self._judge(info), self._success_B)
        return reward_B

    def _judge(self, info: Mapping[str, Any]) -> Array:
        """Each slot by what its own environment says, and by its return where that says nothing: [B]."""
        wanted = self._facts.success_return
        success_B = self._return_B >= (np.inf if wanted is None else wanted)
        for key in reversed(SUCCESS_KEYS):
            if key in info:
                success_B = np.where(info[f"_{key}"], np.asarray(info[key]).astype(bool), success_B)
        return success_B

    def _observe(self) -> Observation:
        sentences = (self._options.sentence,) * self.num_envs
        if self._facts.is_image:
            return Observation({CAMERA: self._tensor(self._seen)}, None, sentences)
        return Observation({}, self._tensor(self._seen.reshape(self.num_envs, -1), torch.float32), sentences)

    def _tensor(self, array: Array, dtype: torch.dtype | None = None) -> Tensor:
        """A copy, so that nothing changes what was handed out."""
        return torch.tensor(array, dtype=dtype, device=self._device)
