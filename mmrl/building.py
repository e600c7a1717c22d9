"""The parts of a run, built from its configuration: what training a run and playing it back share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.config import RunConfig, StageConfig
from mmrl.errors import CheckpointError, MMRLError, TrainingError
from mmrl.protocols import Environment

LOCK = ".lock"


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def build_policy(config: RunConfig, stage: StageConfig, device: torch.device) -> Any:
    """The policy as ``stage`` has it, with the weights of its own configuration."""
    return config.policy.override(stage.policy, where=f"stages.{stage.name}.policy").build(device=device)


def build_environment(
    config: RunConfig, num_envs: int, device: torch.device, *changes: tuple[str, Mapping[str, Any]]
) -> Environment:
    """The run's environment with ``changes`` laid over it, one after the other: (dotted key for messages, fields)."""
    component = config.environment
    for where, fields in changes:
        component = component.override(fields, where=where)
    return component.build(num_envs=num_envs, device=device)


def load_weights(policy: Any, state: Mapping[str, Tensor], problem: str, kind: type[MMRLError] = CheckpointError) -> None:
    """Load a state dict, all of it; where it does not fit, raise ``kind`` with the sentence ``problem`` and what does not."""
    try:
        policy.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        # torch's first line only says that there was an error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise kind(f"{problem} ({' '.join(lines[1:2] or lines)[:200]})") from error


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to the run within the scope; a process that is killed lets go.

    Raises TrainingError where another process has it.
    """
    try:
        file = (run_dir / LOCK).open("w")
    except OSError as error:
        raise TrainingError(f"cannot write {run_dir}: {error.strerror}; choose a folder that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{run_dir} is in use by another process; wait until it ends, or end it") from None
        except OSError:
            pass  # a file system without locks: as safe as it was
        yield
