"""What a user may do wrong, as exceptions whose text is one sentence: what is wrong, where, and what mends it.

The command line prints that sentence and exits with code 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class MMRLError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(MMRLError):
    """A configuration names an unknown key, a value of the wrong type, or two keys that do not fit together."""


class RegistryError(MMRLError):
    """A ``target: package.module:Name`` does not lead to a class of this project."""


class CheckpointError(MMRLError):
    """A checkpoint is missing, damaged, or belongs to another policy."""


class DataError(MMRLError):
    """A data set is damaged, of an unknown format, or not as its description says."""


class TrainingError(MMRLError):
    """A run cannot go on (updates that are not finite, a disk that is full, an empty rollout)."""


class ActionError(MMRLError, ValueError):
    """Actions are not those of the environment: the policy was built for another one."""


def refuse_other_actions(shape: tuple[int, ...], num_envs: int, dim: int) -> None:
    """Raise ActionError unless ``shape`` is that of C actions of ``dim`` numbers in each slot, (num_envs, C, dim)."""
    if len(shape) != 3 or (shape[0], shape[2]) != (num_envs, dim):
        raise ActionError(
            f"step needs actions of shape ({num_envs}, C, {dim}), but got {shape}; give the policy as many numbers in an action "
            f"as the environment takes, {dim} ('policy.action_dim', or 'policy.choices' of an MLP)"
        )


def refuse_other_choices(actions: Any, low: Sequence[float], high: Sequence[float]) -> None:
    """Raise ActionError unless the array ``actions`` [..., A] holds whole numbers within the bounds (of A numbers each)."""
    if not ((actions >= low) & (actions <= high) & (actions == actions.round())).all():
        raise ActionError(
            f"the environment's actions are whole numbers from {list(low)} to {list(high)}; give the policy these choices "
            "('policy.choices' of an MLP)"
        )


class EnvironmentMissing(MMRLError):
    """Something outside this project is not installed.

    capability: what is missing, as a noun ("ManiSkill", "Vulkan"). command: what installs it.
    """

    def __init__(self, capability: str, command: str) -> None:
        super().__init__(f"{capability} is not available on this machine; install it with `{command}`")
        self.capability = capability
        self.command = command
