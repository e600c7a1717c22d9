"""Times, and what a network's output says about the next step: where it predicts a velocity, and where it predicts noise.

A schedule's numbers are those of the checkpoint's scheduler. ``levels`` are of the state: t of ``mmrl.numerics.flow``, or the
signal's share of the variance (alpha-bar) of ``mmrl.numerics.diffusion``. ``times`` are what the network is told.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrl.errors import MMRLError
from mmrl.numerics import diffusion, flow
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


class NoiseSchedule(Schedule):
    """Of diffusers' DDIMScheduler: networks that predict noise, or the v of progressive distillation (arXiv 2202.00512)."""

    rules = frozenset({"ode", "ddim"})

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._predicts_v = scheduler.config.prediction_type == "v_prediction"
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise MMRLError(
                f"policy.checkpoint: its scheduler's prediction_type is {scheduler.config.prediction_type!r}; "
                "only 'epsilon' and 'v_prediction' are supported"
            )

    def grid(self, steps: int) -> Grid:
        scheduler = self._scheduler
        scheduler.set_timesteps(steps)
        times, apart = scheduler.timesteps.cpu(), scheduler.config.num_train_timesteps // steps
        shares = scheduler.alphas_cumprod.cpu()
        last = shares[times[-1] - apart] if times[-1] >= apart else scheduler.final_alpha_cumprod
        return Grid(torch.cat([shares[times], last.reshape(1)]), times.float())

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def transition(
        self, x: Tensor, output: Tensor, grid: Grid, step_B: Tensor, *, rule: str, level: float | None
    ) -> tuple[Transition, Tensor]:
        """The lengths are 1: what is divided by them in flows has no counterpart here."""
        shares = grid.levels.to(x.device, torch.promote_types(x.dtype, torch.float32))
        share, share_next = shares[step_B], shares[step_B + 1]
        noise = self._noise(x, output, share)
        eta = 0.0 if rule == "ode" or level is None else level
        return diffusion.ddim(x, noise, share, share_next, eta=eta), torch.ones_like(share)

    def velocity(self, predict: Predict, x_t: Tensor, t_N: Tensor) -> Tensor:
        """At the place and time of a flow that has as much noise; times beyond the first of the schedule are moved to it."""
        shares = self._scheduler.alphas_cumprod.to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
        times = diffusion.flow_time(shares)
        t_N = t_N.to(times.dtype).clamp(times[0], times[-1])
        share_N, place_N = diffusion.share_at(t_N), _place(times, t_N)
        share = share_N.reshape(-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = share.sqrt(), (1 - share).sqrt()
        x = (x_t.to(times.dtype) * (alpha + sigma)).to(x_t.dtype)
        noise = self._noise(x, predict(x, place_N), share_N)
        return noise - (x.to(times.dtype) - sigma * noise) / alpha

    def noised(self, clean: Tensor, noise: Tensor, normal_N: Tensor, *, logit_normal: bool) -> Noised:
        """Any of the schedule's times, as likely as any other."""
        shares = self._scheduler.alphas_cumprod.to(clean.device, clean.dtype)
        time_N = (torch.special.ndtr(normal_N) * len(shares)).long().clamp(max=len(shares) - 1)
        x = diffusion.noised(clean, noise, shares[time_N])
        target = diffusion.noised(noise, -clean, shares[time_N]) if self._predicts_v else noise
        return Noised(x, time_N.to(clean.dtype), target)

    def _noise(self, x: Tensor, output: Tensor, share_B: Tensor) -> Tensor:
        """The noise that the network sees in x."""
        output, x = output.to(share_B.dtype), x.to(share_B.dtype)
        return diffusion.noised(output, x, share_B) if self._predicts_v else output


def _place(values: Tensor, x_N: Tensor) -> Tensor:
    """Where among rising ``values`` the numbers lie: 2.5 is halfway between the third and the fourth."""
    above_N = torch.searchsorted(values, x_N.contiguous()).clamp(1, len(values) - 1)
    low_N, high_N = values[above_N - 1], values[above_N]
    return above_N - 1 + (x_N - low_N) / (high_N - low_N)


def chosen_steps(trained: TrainedSteps, steps: int, iteration: int, seed: int) -> list[int]:
    """Which of ``steps`` denoising steps are drawn at random and trained in this iteration, in their order."""
    if trained.which in ("all", "all_but_last"):
        return list(range(steps - (trained.which == "all_but_last")))
    assert trained.size is not None
    stop = _stop(trained, steps)
    turn = iteration // trained.every
    if trained.which == "window":
        places = stop - trained.start - trained.size + 1
        random = trained.order == "random"
        first = trained.start + salt(seed, turn) % places if random else _progressive(trained, trained.size, stop, iteration)
        return list(range(first, first + trained.size))
    order = sorted(range(trained.start, stop), key=lambda step: salt(seed, turn, step))
    return sorted(order[: trained.size])


def possible_steps(trained: TrainedSteps, steps: int) -> list[int]:
    """All that ``chosen_steps`` may choose, in whatever iteration."""
    if trained.size is None:
        return chosen_steps(trained, steps, 0, 0)
    stop = _stop(trained, steps)
    if trained.which == "random":
        return list(range(trained.start, stop))
    return sorted({first + k for first in _firsts(trained, trained.size, stop) for k in range(trained.size)})


def _stop(trained: TrainedSteps, steps: int) -> int:
    """The step before which all lie that may be chosen: by default the last one."""
    return steps - 1 if trained.stop is None else trained.stop


def _firsts(trained: TrainedSteps, size: int, stop: int) -> range:
    """Steps with which a window may begin; one that is placed anew has a stride of 1."""
    return range(trained.start, stop - size + 1, trained.stride)


def _progressive(trained: TrainedSteps, size: int, stop: int, iteration: int) -> int:
    """The first step of a window that moves on, and begins again when it cannot."""
    firsts = _firsts(trained, size, stop)
    left = iteration % sum(_stay(trained, first, stop) for first in firsts)
    for first in firsts:
        left -= _stay(trained, first, stop)
        if left < 0:
            return first
    raise AssertionError("the iterations of a round are over only when another begins")


def _stay(trained: TrainedSteps, first: int, stop: int) -> int:
    """Iterations for which a window stays that begins with this step."""
    if trained.decay == "linear":
        least = max(trained.every // 4, 1) if trained.least is None else trained.least
        share = first / max(stop - 1, 1)
        return max(least, int(trained.every * (1 - share) + least * share))
    if trained.decay == "exponential":
        return math.ceil(trained.every * math.exp(-trained.decay_rate * max(first - trained.decay_from, 0)))
    return trained.every
