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
_SLOW = 0.05  # seconds of a step above which one environment has to do


def probe(module_name: str) -> str:
    """Build the module's environments with their default config and step them for a second."""
    found = importlib.import_module(module_name)
    environments = [name for name, value in vars(found).items() if inspect.isclass(value) and _is_environment(value, module_name)]
    return "; ".join(f"{name} {_steps_per_second(f'{module_name}:{name}')}" for name in environments) or "no environment in it"


def _is_environment(value: type, module_name: str) -> bool:
    return value.__module__ == module_name and all(hasattr(value, name) for name in ("Config", "reset", "step", "family_of"))


def _steps_per_second(target: str) -> str:
    """Timed with as many environments as a person would run: one where each is a process, and many where they are cheap."""
    envs, (seconds, cameras) = 1, _time(target, 1)
    if seconds <= _SLOW:  # a slow one may take minutes to build, and is not built again
        envs, (seconds, cameras) = _ENVS, _time(target, _ENVS)
    rate = envs / seconds
    return f"{rate:,.{0 if rate >= 10 else 1}f} steps/s at {envs} environment{'s' * (envs > 1)} ({cameras or 'no camera'})"


def _time(target: str, envs: int) -> tuple[float, str]:
    """Seconds of a step of all environments, measured for at least _SECONDS, and what their cameras show."""
    environment = Component.parse({"target": target}).build(num_envs=envs, device=torch.device("cpu"))
    try:
        observation = environment.reset(torch.arange(envs))
        actions = torch.zeros(envs, 1, environment.action_spec.dim)
        environment.step(actions)
        start, steps = time.perf_counter(), 0
        while steps == 0 or time.perf_counter() - start < _SECONDS:
            environment.step(actions)
            steps += 1
        seconds = (time.perf_counter() - start) / steps
    finally:
        environment.close()
    dark = [name for name, image in observation.images.items() if int(image.amax()) == int(image.amin())]
    if dark:
        raise RuntimeError(f"camera {dark[0]} shows nothing but one colour; the renderer does not work")
    return seconds, ", ".join(f"{name} {image.shape[2]}x{image.shape[1]}" for name, image in observation.images.items())


if __name__ == "__main__":
    answer(probe, sys.argv[1])
