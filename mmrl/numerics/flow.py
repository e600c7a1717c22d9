"""One denoising step of a flow model as a Gaussian, and the likelihood of what was drawn from it.

Convention everywhere: t = 1 is noise, t = 0 is data, ``x_t = (1 - t) x0 + t noise``, velocity ``v = noise - x0``, and a step goes
from t to a smaller t'. With delta = t - t', clean estimate ``x0_hat = x - t v`` and noise estimate ``x1_hat = x + (1 - t) v``:

===========  ====================================================================================  ==================
rule         mean                                                                                  std
===========  ====================================================================================  ==================
ode          x - delta v                                                                           0
flow_sde     (1 - t') x0_hat + (t' - s^2 delta / (2 t)) x1_hat, with s = a sqrt(t / (1 - t_star))  s sqrt(delta)
cps          (1 - t') x0_hat + t' cos(a pi / 2) x1_hat                                             t' sin(a pi / 2)
flow_noise   x - delta v                                                                           given (learned)
constant     as flow_sde with s = a                                                                a sqrt(delta)
===========  ====================================================================================  ==================

where a is the noise level. Sources: flow_sde is Flow-GRPO (arXiv 2505.05470) and pi_RL (arXiv 2510.25889), which also gives
flow_noise; cps is coefficients-preserving sampling (arXiv 2509.05952); constant is DanceGRPO (arXiv 2505.07818).
With a = 0 every rule is the Euler step of the ODE. flow_sde and constant keep the marginals of the ODE up to an error of first
order in delta. cps keeps them exactly where the clean estimate is exact (its noise coefficients add up to t'), but where x_t
leaves x0 uncertain it loses variance at every step however small: A B (1 - cos(a pi / 2))^2 / (A + B), with A and B the variances
that data and noise contribute to x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor  # a number, or a tensor [B] (one per sample) or one that broadcasts against x_t

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Transition(NamedTuple):
    """The Gaussian a step draws from; ``std`` broadcasts against ``mean`` and is 0 where the step is deterministic."""

    mean: Tensor
    std: Tensor


class _Step(NamedTuple):
    """What every rule reads, in one dtype and ready to broadcast: see the module's docstring for the letters."""

    x: Tensor
    velocity: Tensor
    t: Tensor
    t_next: Tensor
    noise_level: Tensor | None
    t_star: Tensor
    std: Tensor | None

    @property
    def delta(self) -> Tensor:
        return self.t - self.t_next

    def mix(self, clean_weight: Tensor, noise_weight: Tensor) -> Tensor:
        """``clean_weight * x0_hat + noise_weight * x1_hat``."""
        return clean_weight * (self.x - self.t * self.velocity) + noise_weight * (self.x + (1 - self.t) * self.velocity)


def transition(
    x_t: Tensor,
    velocity: Tensor,
    t: Scalar,
    t_next: Scalar,
    *,
    rule: str,
    noise_level: Scalar | None = None,
    t_star: Scalar | None = None,
    std: Tensor | None = None,
) -> Transition:
    """The Gaussian from which x at ``t_next`` is drawn, given ``x_t`` and the velocity there (both [B, ...]).

    t, t_next, t_star and noise_level are numbers or tensors; a tensor [B] holds one value per sample. Everything is computed in
    float32, or float64 if ``x_t`` is. Pass times in the same dtype when acting and when scoring again, and the numbers are equal.

    rule: a row of the module's table. noise_level (a): required by flow_sde, cps (there between 0 and 1) and constant.
    t_star: read by flow_sde alone; defaults to t and must be given where t = 1, usually as the next grid point
    (``guarded_time`` does that). std: required by flow_noise alone, broadcastable to ``x_t``.

    Raises ValueError for an unknown rule, for an argument that is missing or that the rule does not know, for a noise level out
    of range, and for t_star = 1 (tensors on an accelerator are not checked, to avoid waiting for it).
    """
    if rule not in _RULES:
        raise ValueError(f"flow rule {rule!r} is unknown; use one of {', '.join(sorted(_RULES))}")
    chosen = _RULES[rule]
    _check_arguments(rule, chosen, noise_level=noise_level, std=std)
    dtype = torch.promote_types(x_t.dtype, torch.float32)

    def ready(value: Scalar) -> Tensor:
        return _over_batch(value, x_t, dtype)

    if chosen.uses_t_star and _reaches(t if t_star is None else t_star, 1.0):
        raise ValueError(
            f"flow rule {rule!r} divides by 1 - t_star, which is 0 here; give t_star (the next grid point) where t = 1"
        )
    step = _Step(
        x=x_t.to(dtype),
        velocity=velocity.to(dtype),
        t=ready(t),
        t_next=ready(t_next),
        noise_level=None if noise_level is None else ready(noise_level),
        t_star=ready(t if t_star is None else t_star),
        std=None if std is None else std.to(dtype),
    )
    return chosen.step(step)


def _ode(s: _Step) -> Transition:
    return Transition(s.x - s.delta * s.velocity, torch.zeros_like(s.delta))


def _flow_noise(s: _Step) -> Transition:
    assert s.std is not None
    return Transition(s.x - s.delta * s.velocity, s.std)


def _sde(s: _Step, sigma: Tensor) -> Transition:
    noise_weight = s.t_next - sigma**2 * s.delta / (2 * s.t)
    return Transition(s.mix(1 - s.t_next, noise_weight), sigma * s.delta.sqrt())


def _flow_sde(s: _Step) -> Transition:
    assert s.noise_level is not None
    return _sde(s, s.noise_level * (s.t / (1 - s.t_star)).sqrt())


def _constant(s: _Step) -> Transition:
    assert s.noise_level is not None
    return _sde(s, s.noise_level)


def _cps(s: _Step) -> Transition:
    assert s.noise_level is not None
    angle = s.noise_level * (math.pi / 2)
    return Transition(s.mix(1 - s.t_next, s.t_next * angle.cos()), s.t_next * angle.sin())


class _Rule(NamedTuple):
    step: Callable[[_Step], Transition]
    needs: frozenset[str]  # of {"noise_level", "std"}; the other is refused
    max_noise_level: float = math.inf
    uses_t_star: bool = False


_NOISE_LEVEL = frozenset({"noise_level"})
_RULES = {
    "ode": _Rule(_ode, frozenset()),
    "flow_sde": _Rule(_flow_sde, _NOISE_LEVEL, uses_t_star=True),
    "cps": _Rule(_cps, _NOISE_LEVEL, max_noise_level=1.0),
    "flow_noise": _Rule(_flow_noise, frozenset({"std"})),
    "constant": _Rule(_constant, _NOISE_LEVEL),
}
RULES = frozenset(_RULES)
"""The names that ``transition`` accepts as ``rule``."""


def _check_arguments(name: str, rule: _Rule, *, noise_level: Scalar | None, std: Tensor | None) -> None:
    for argument, value in (("noise_level", noise_level), ("std", std)):
        if argument in rule.needs and value is None:
            raise ValueError(f"flow rule {name!r} needs {argument}; pass it to transition")
        if argument not in rule.needs and value is not None:
            raise ValueError(f"flow rule {name!r} does not use {argument}; leave it out")
    too_high = noise_level is not None and _reaches(noise_level, rule.max_noise_level, strictly=True)
    if too_high or (isinstance(noise_level, float | int) and noise_level < 0):
        raise ValueError(f"noise_level {noise_level} is out of range for flow rule {name!r}; use 0 to {rule.max_noise_level}")


def _reaches(value: Scalar, bound: float, *, strictly: bool = False) -> bool:
    """Whether any entry is >= bound (> with ``strictly``); False for tensors on an accelerator, where looking is dear."""
    if not isinstance(value, Tensor):
        return value > bound if strictly else value >= bound
    if value.device.type != "cpu":
        return False
    return bool((value > bound if strictly else value >= bound).any())


def _over_batch(value: Scalar, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as a tensor that broadcasts against ``like`` from the left: [B] becomes [B, 1, ..., 1]."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=like.device)  # a fill, not a copy from the host
    value = value.to(like.device, dtype)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def guarded_time(t: Tensor, t_next: Tensor) -> Tensor:
    """t_star of flow_sde: t, but the next grid point where t = 1 (there 1 - t would be 0)."""
    return torch.where(t >= 1, t_next, t)


def time_grid(num_steps: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[K + 1] times from 1 (noise) to 0 (data), uniform: t_i = 1 - i / K, rounded once from float64."""
    if num_steps < 1:
        raise ValueError(f"time_grid needs at least one step, got num_steps = {num_steps}")
    return (1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps).to(device=device, dtype=dtype)


def interpolate(x0: Tensor, noise: Tensor, t: Scalar) -> Tensor:
    """x_t = (1 - t) x0 + t noise, in float32 or better; t a number or [B]."""
    dtype = torch.promote_types(x0.dtype, torch.float32)
    t = _over_batch(t, x0, dtype)
    return (1 - t) * x0.to(dtype) + t * noise.to(dtype)


def clean_estimate(x_t: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """x0_hat = x_t - t v: where the straight path from ``x_t`` ends at t = 0. In float32 or better."""
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    return x_t.to(dtype) - _over_batch(t, x_t, dtype) * velocity.to(dtype)


def noise_estimate(x_t: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """x1_hat = x_t + (1 - t) v: where the straight path through ``x_t`` began at t = 1. In float32 or better."""
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    return x_t.to(dtype) + (1 - _over_batch(t, x_t, dtype)) * velocity.to(dtype)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x; mean, std^2) in float32 or better; exactly 0, with zero gradients, where std is 0.

    A deterministic step has no density; 0 lets it add nothing to a sum over steps.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, mean, std = x.to(dtype), mean.to(dtype), std.to(dtype)
    noisy = std > 0
    safe = torch.where(noisy, std, torch.ones_like(std))  # keeps 0 / 0 out of the backward pass as well
    log_prob = -safe.log() - _LOG_SQRT_2PI - 0.5 * ((x - mean) / safe) ** 2
    return torch.where(noisy, log_prob, torch.zeros_like(log_prob))


def gaussian_entropy(std: Tensor) -> Tensor:
    """Elementwise entropy (nats) of N(., std^2) = log std + 0.5 (1 + log 2 pi); 0 where std is 0, as for the log-probability."""
    std = std.to(torch.promote_types(std.dtype, torch.float32))
    noisy = std > 0
    safe = torch.where(noisy, std, torch.ones_like(std))
    return torch.where(noisy, safe.log() + (0.5 + _LOG_SQRT_2PI), torch.zeros_like(std))
