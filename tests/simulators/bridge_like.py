"""A task that asks for modes of its own, as ManiSkill's bridge_dataset_eval tasks do, without their assets."""

from __future__ import annotations

from typing import Any

from mani_skill.envs.tasks import PushCubeEnv
from mani_skill.utils.registration import register_env


@register_env("PushCubeLikeBridge-v1", max_episode_steps=50)
class PushCubeLikeBridge(PushCubeEnv):
    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")
    SUPPORTED_REWARD_MODES = ("none",)

    def get_language_instruction(self, **_: Any) -> list[str]:
        return ["put carrot on plate"] * self.num_envs
