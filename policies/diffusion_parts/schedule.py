"""Times, and what a network's output says about the next step: where it predicts a velocity, and where it predicts noise.

A schedule's numbers are those of the checkpoint's scheduler. ``levels`` are of the state: t of ``mmrl.numerics.flow``, or the
signal's share of the variance (alpha-bar) of ``mmrl.numerics.diffusion``. ``times`` are what the network is told.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrl.numerics import flow
from mmrl.numerics.flow import Transition
from mmrl.numerics.hashing import salt
from policies.diffusion_parts.options import TrainedSteps

Predict = Callable[[Tensor, Tensor], Tensor]  # x [B, ...] and the network's times [B] -> what the network says, [B, ...]


class Grid(NamedTuple):
    """K steps: levels [K + 1] of the states between them, and times [K] at which the network is asked."""

    levels: Tensor
    times: Tensor


class Noised(NamedTuple):
    """Something to imitate: the state x [B, ...], the network's time [B], and what it should say [B, ...]."""

    x: Tensor
    time: Tensor
    target: Tensor


class Schedule(ABC):
    """See the module."""

    rules: frozenset[str]  # which samplers it knows

    @abstractmethod
    def grid(self, steps: int) -> Grid:
        """On the CPU, float32."""

    @abstractmethod
    def start(self, noise: Tensor) -> Tensor:
        """The first state."""

    @abstractmethod
    def transition(
        self, x: Tensor, output: Tensor, grid: Grid, step_B: Tensor, *, rule: str, level: float | None
    ) -> tuple[Transition, Tensor]:
        """The Gaussian of the state after the steps ``step_B``, and the lengths [B] of these."""

    @abstractmethod
    def velocity(self, predict: Predict, x_t: Tensor, t_N: Tensor) -> Tensor:
        """The velocity at times and places of ``mmrl.numerics.flow``."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, normal_N: Tensor, *, logit_normal: bool) -> Noised:
        """A state to imitate at a time that comes from ``normal_N``, a standard normal number each."""


class FlowSchedule(Schedule):
    """Of diffusers' FlowMatchEulerDiscreteScheduler (or one with its sigmas). ``sigmas`` fills in its timesteps for K steps."""

    rules = frozenset({"ode", "flow_sde", "cps", "constant"})

    def __init__(self, scheduler: Any, set_timesteps: Callable[[int], None], shift: Callable[[Tensor], Tensor]) -> None:
        self._scheduler, self._set_timesteps, self._shift = scheduler, set_timesteps, shift
        self._grids: dict[int, Grid] = {}

    def grid(self, steps: int) -> Grid:
        if steps not in self._grids:
            self._set_timesteps(steps)
            self._grids[steps] = Grid(self._scheduler.sigmas.float().cpu(), self._scheduler.timesteps.float().cpu())
        return self._grids[steps]

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def transition(
        self, x: Tensor, output: Tensor, grid: Grid, step_B: Tensor, *, rule: str, level: float | None
    ) -> tuple[Transition, Tensor]:
        levels = grid.levels.to(x.device, torch.promote_types(x.dtype, torch.float32))
        t, t_next = levels[step_B], levels[step_B + 1]
        star = flow.guarded_time(t, t_next)
        return flow.transition(x, output, t, t_next, rule=rule, noise_level=level, t_star=star), t - t_next

    def velocity(self, predict: Predict, x_t: Tensor, t_N: Tensor) -> Tensor:
        return predict(x_t, t_N * self._scheduler.config.num_train_timesteps)

    def noised(self, clean: Tensor, noise: Tensor, normal_N: Tensor, *, logit_normal: bool) -> Noised:
        """Times of Stable Diffusion 3 (arXiv 2403.03206): logit-normal (or uniform), then shifted as the scheduler's."""
        u_N = normal_N.sigmoid() if logit_normal else torch.special.ndtr(normal_N)
        t_N = self._shift(u_N)
        time_N = t_N * self._scheduler.config.num_train_timesteps
        return Noised(flow.interpolate(clean, noise, t_N), time_N, noise - clean)


def chosen_steps(trained: TrainedSteps, steps: int, iteration: int, seed: int) -> list[int]:
    """Which of ``steps`` denoising steps are drawn at random and trained in this iteration, in their order."""
    if trained.which in ("all", "all_but_last"):
        return list(range(steps - (trained.which == "all_but_last")))
    assert trained.size is not None
    stop = steps - 1 if trained.stop is None else trained.stop
    turn, places = iteration // trained.every, stop - trained.start - trained.size + 1
    if trained.which == "window":
        moved = salt(seed, turn) % places if trained.order == "random" else _moved(turn * trained.stride, places, trained.stride)
        return list(range(trained.start + moved, trained.start + moved + trained.size))
    order = sorted(range(trained.start, stop), key=lambda step: salt(seed, turn, step))
    return sorted(order[: trained.size])


def _moved(distance: int, places: int, stride: int) -> int:
    """How far a window has moved that begins again when it cannot move on."""
    return distance % (-(-places // stride) * stride)
