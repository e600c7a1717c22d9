"""The probe of a simulator (see ``mmrl.probes``): ``python -m mmrl.simulator_probe simulators.tabletop``."""

from __future__ import annotations

import importlib
import inspect
import sys
import time

import torch

from mmrl.component import Component
from mmrl.probes import answer

_SECONDS = 1.0  # how long a simulator is timed
_ENVS = 32


def probe(module_name: str) -> str:
    """Build the module's environments with their default config and step them for a second."""
    found = importlib.import_module(module_name)
    environments = [name for name, value in vars(found).items() if inspect.isclass(value) and _is_environment(value, module_name)]
    return "; ".join(f"{name} {_steps_per_second(f'{module_name}:{name}')}" for name in environments) or "no environment in it"


def _is_environment(value: type, module_name: str) -> bool:
    return value.__module__ == module_name and all(hasattr(value, name) for name in ("Config", "reset", "step", "family_of"))


def _steps_per_second(target: str) -> str:
    environment = Component.parse({"target": target}).build(num_envs=_ENVS, device=torch.device("cpu"))
    observation = environment.reset(torch.arange(_ENVS))
    actions = torch.zeros(_ENVS, 1, environment.action_spec.dim)
    environment.step(actions)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        environment.step(actions)
        steps += _ENVS
    rate = steps / (time.perf_counter() - start)
    environment.close()
    cameras = ", ".join(f"{name} {image.shape[2]}x{image.shape[1]}" for name, image in observation.images.items())
    return f"{rate:,.0f} steps/s at {_ENVS} environments ({cameras or 'no camera'})"


if __name__ == "__main__":
    answer(probe, sys.argv[1])
