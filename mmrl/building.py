"""The parts of a run, built from its configuration: what training a run and playing it back share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.component import Component
from mmrl.config import RunConfig, StageConfig
from mmrl.errors import CheckpointError, ConfigError, MMRLError, TrainingError
from mmrl.protocols import AsyncEnvironment, Environment, GradualEnvironment
from mmrl.workers.remote import RemoteEnvironment

LOCK = ".lock"


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one. Raises ConfigError for a device that this machine, or this torch, does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which of them depends on the device
        raise ConfigError(f"'device' is '{name}', which cannot be used here ({_first_line(error)}); write auto or cpu") from error
    return device


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def build_policy(config: RunConfig, stage: StageConfig, device: torch.device) -> Any:
    """The policy as ``stage`` has it, with the weights of its own configuration."""
    return config.policy.override(stage.policy, where=f"stages.{stage.name}.policy").build(device=device)


def build_environment(
    config: RunConfig, num_envs: int, device: torch.device, *changes: tuple[str, Mapping[str, Any]]
) -> Environment:
    """The run's environment with ``changes`` laid over it, one after the other: (dotted key for messages, fields)."""
    return _changed(config.environment, changes).build(num_envs=num_envs, device=device)


def build_parts(
    config: RunConfig, num_envs: int, parts: int, device: torch.device, *changes: tuple[str, Mapping[str, Any]]
) -> list[Environment]:
    """As ``build_environment``, but in ``parts`` of equal size, of which each can simulate while the policy acts for another.

    Of a simulator that cannot do that by itself each part gets a process of its own. A single part stays as it is, and so does an
    environment that takes actions as they come (GradualEnvironment): its rewards, and their processes, are there once.
    """
    component = _changed(config.environment, changes)
    if issubclass(component.cls, GradualEnvironment):
        parts = 1

    def build(size: int) -> Environment:
        if parts == 1 or _simulates_apart(component):
            return component.build(num_envs=size, device=device)
        threads = config.threads or 1
        return RemoteEnvironment(component.target, component.config, num_envs=size, device=device, threads=threads)

    built: list[Environment] = []
    try:
        for _ in range(parts):
            built.append(build(num_envs // parts))
    except BaseException:
        for environment in built:
            environment.close()
        raise
    return built


def _simulates_apart(component: Component) -> bool:
    says = getattr(component.cls, "simulates_apart", None)
    return issubclass(component.cls, AsyncEnvironment) and (says is None or says(component.config))


def _changed(component: Component, changes: Sequence[tuple[str, Mapping[str, Any]]]) -> Component:
    for where, fields in changes:
        component = component.override(fields, where=where)
    return component


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
