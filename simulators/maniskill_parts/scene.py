"""ManiSkill's own environment, B episodes at a time, as far as this project needs it.

ManiSkill's ``step`` observes after every action. Here its observation mode is "none" once it is built, and ``observe`` asks for
images when a chunk is over. That, the seeds and the numbers in the state reach below ManiSkill's public interface
(``_obs_mode``, ``_get_obs_agent``, ``_get_obs_extra``, ``_get_obs_sensor_data``), which pyproject.toml therefore pins to 3.0.
"""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import mani_skill
import mani_skill.envs  # registers the tasks
import numpy as np
import torch
from mani_skill.utils.registration import REGISTERED_ENVS
from torch import Tensor

from mmrl.errors import EnvironmentMissing, MMRLError
from mmrl.registry import did_you_mean
from mmrl.types import ActionSpec
from simulators.maniskill_parts.options import Options, in_words, sentences

mani_skill.logger.setLevel("ERROR")  # it warns at every reset that the task's own actors have no initial pose
_ICDS = Path("/usr/share/vulkan/icd.d")
# Debian 12's own Mesa is too old.
_RELEASE = " -t bookworm-backports" if "bookworm" in platform.freedesktop_os_release().get("VERSION", "") else ""
_DRIVER = f"apt-get install{_RELEASE} libvulkan1 mesa-vulkan-drivers"


class Result(NamedTuple):
    """What an action led to in B environments, before any time limit."""

    reward_B: Tensor
    success_B: Tensor
    failed_B: Tensor
    metrics: dict[str, Tensor]


class Scene:
    """B environments of one task. ``gpu``: simulated together on the CUDA device; otherwise B is 1."""

    def __init__(self, options: Options, *, num_envs: int = 1, gpu: bool = False) -> None:
        if options.registered_by is not None:
            _import(options.registered_by)
        if options.task not in REGISTERED_ENVS:
            raise MMRLError(
                f"environment.task = {options.task}: ManiSkill has none so called{did_you_mean(options.task, REGISTERED_ENVS)}"
            )
        self.options = options
        self.env: Any = _make(options, num_envs, gpu)
        self._dense_B = torch.zeros(num_envs, device=self.env.device)  # the last dense reward, for that of progress
        self.reset([0] * num_envs)  # builds the scene
        space: Any = self.env.single_action_space
        self.action_spec = ActionSpec(len(space.low), tuple(space.low.tolist()), tuple(space.high.tolist()))
        self.max_steps: int = options.max_steps or REGISTERED_ENVS[options.task].max_episode_steps or 200
        info = self.env.get_info()
        self.metric_names = tuple(
            sorted({"success", *(k for k, v in info.items() if isinstance(v, Tensor) and v.dtype == torch.bool)})
        )

    def reset(self, task_ids: list[int], env_idx: Tensor | None = None) -> list[str]:
        """Start episodes, in the environments ``env_idx`` (None: all); their instructions.

        On the CPU the scene is built anew each time: the contacts that PhysX remembers would let an episode depend on the last.
        """
        seeds = [_seed(self.options.seed, task) for task in task_ids]
        self._dense_B[slice(None) if env_idx is None else env_idx] = 0
        if env_idx is None and len(task_ids) == 1:
            self.env.reset(seed=seeds, options={"reconfigure": True})
        else:
            # ManiSkill draws all that it resets together from the first seed: an episode must not depend on its neighbours.
            for seed, index in zip(seeds, range(len(seeds)) if env_idx is None else env_idx.tolist(), strict=True):
                self._reset_one(seed, index)
        if choice := sentences(self.options):
            return [choice[seed % len(choice)] for seed in seeds]
        if not hasattr(self.env, "get_language_instruction"):
            return [in_words(self.options.task)] * len(seeds)
        own = self.env.get_language_instruction()
        return list(own) if env_idx is None else [own[index] for index in env_idx.tolist()]

    def _reset_one(self, seed: int, index: int) -> None:
        seeds = self.env._episode_seed.copy()
        seeds[index] = seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.env._episode_seed = seeds
            self.env._enhanced_determinism = False
            self.env.reset(options={"env_idx": torch.tensor([index], device=self.env.device)})

    def step(self, actions_BA: Tensor) -> Result:
        _, reward_B, _, _, info = self.env.step(actions_BA)
        none_B = torch.zeros_like(reward_B, dtype=torch.bool)
        success_B, failed_B = (info.get(name, none_B).bool() for name in ("success", "fail"))
        metrics = {name: info.get(name, none_B).float() for name in self.metric_names}
        return Result(self._reward(reward_B.float(), success_B), success_B, failed_B & ~success_B, metrics)

    def _reward(self, dense_B: Tensor, success_B: Tensor) -> Tensor:
        if self.options.reward == "sparse":
            return success_B.float()
        if self.options.reward == "dense":
            return dense_B
        progress_B, self._dense_B = dense_B - self._dense_B, dense_B
        return progress_B

    def images(self) -> dict[str, Tensor]:
        """Camera name -> uint8 [B, height, width, 3]."""
        if not self.options.render:
            return {}
        return {name: data["rgb"] for name, data in self.env._get_obs_sensor_data().items()}

    def state(self) -> Tensor:
        """float32 [B, S]: joint positions and velocities, and what else ManiSkill shows a policy that sees images."""
        info = self.env.get_info()
        parts = [*_leaves(self.env._get_obs_agent()), *_leaves(self.env._get_obs_extra(info))]
        return torch.cat([part.reshape(len(part), -1).float() for part in parts], dim=1)

    def frame(self) -> Tensor:
        """A large picture of each environment: uint8 [B, height, width, 3]."""
        return self.env.render_rgb_array()

    def close(self) -> None:
        self.env.close()


def _make(options: Options, num_envs: int, gpu: bool) -> Any:
    cuda = torch.cuda.is_available()
    if options.render and not cuda and (_ICDS / "lvp_icd.json").exists():
        os.environ.setdefault("VK_ICD_FILENAMES", str(_ICDS / "lvp_icd.json"))  # Mesa's other drivers need devices
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's own threads only slow down a machine full of workers
    extra: dict[str, Any] = {} if options.robot is None else {"robot_uids": options.robot}
    if options.image_size is not None:
        extra["sensor_configs"] = {"width": options.image_size, "height": options.image_size}
    # Where a task lacks the plain mode: segmentation beside the pictures, and no reward, for which success is enough.
    task: Any = REGISTERED_ENVS[options.task].cls
    pictures = "rgb+segmentation" if "rgb+segmentation" in task.SUPPORTED_OBS_MODES else "rgb"
    sparse = "sparse" if "sparse" in task.SUPPORTED_REWARD_MODES else "none"
    try:
        env: Any = gymnasium.make(
            options.task,
            num_envs=num_envs,
            obs_mode=pictures if options.render else "none",
            reward_mode=sparse if options.reward == "sparse" else "normalized_dense",
            control_mode=options.control_mode,
            sim_backend="physx_cuda" if gpu else "physx_cpu",
            render_backend=("sapien_cuda" if cuda else "sapien_cpu") if options.render else "none",
            render_mode="rgb_array" if options.render else None,
            human_render_camera_configs={"width": 256, "height": 256},
            **extra,
        ).unwrapped
    except (AssertionError, KeyError, NotImplementedError) as error:  # what ManiSkill makes of what it does not know
        about = f"control_mode '{options.control_mode}', robot {options.robot or 'of its own'}, reward '{options.reward}'"
        raise MMRLError(f"ManiSkill's {options.task} does not work with {about} ({error})") from error
    except RuntimeError as error:
        if "device" not in str(error).lower() and "vulkan" not in str(error).lower():
            raise
        raise EnvironmentMissing(
            f"a Vulkan driver that ManiSkill can render with (on the CPU, Mesa 24.3 or newer: {error})", _DRIVER
        ) from error
    env._obs_mode = "none"  # see the module
    return env


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MMRLError(
            f"'environment.registered_by' is {module}, which cannot be imported ({error}); install its package"
        ) from error


def _seed(seed: int, task: int) -> int:
    """A number below 2^31 for each (seed, task id)."""
    return int(np.random.SeedSequence([seed, task]).generate_state(1)[0]) % 2**31


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [tree]
