"""What a user may do wrong, as exceptions whose text is one sentence: what is wrong, where, and what mends it.

The command line prints that sentence and exits with code 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


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


class EnvironmentMissing(MMRLError):
    """Something outside this project is not installed.

    capability: what is missing, as a noun ("ManiSkill", "Vulkan"). command: what installs it.
    """

    def __init__(self, capability: str, command: str) -> None:
        super().__init__(f"{capability} is not available on this machine; install it with `{command}`")
        self.capability = capability
        self.command = command
