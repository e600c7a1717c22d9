"""Losses of policies and critics, and estimates of the divergence between two policies.

A unit is a token, a denoising step or an entry of an action chunk: whatever has one log-probability. Letters: B samples, K units.
Every loss takes ``normalizer``, the number it divides by. Give it the count of the whole mini-batch and the losses of its
micro-batches add up to the loss of the whole; leave it out and the local count stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mmrl.numerics import masked

F = TypeVar("F")


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise and the numbers worth logging beside it (detached; floats or scalar tensors)."""

    value: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


def clipped_surrogate(
    log_probs_BK: Tensor,
    old_log_probs_BK: Tensor,
    advantages_BK: Tensor,
    mask_BK: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    objective: str = "clip",
    ratio: str = "unit",
    reduce: str = "unit_mean",
    normalizer: float | None = None,
    weights_BK: Tensor | None = None,
) -> Loss:
    """A policy-gradient objective with bounded ratios r, to minimise. A clip_low of 1 or more is no bound, for r is positive.

    objective: ``clip``, PPO's (arXiv 1707.06347), max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); ``cispo`` (arXiv
    2506.13585), REINFORCE weighted by the bounded ratio, -A sg(clip(r, 1 - clip_low, 1 + clip_high)) log p: every unit keeps its
    gradient, of bounded size.
    advantages_BK may be [B, 1]. mask_BK (bool): the units that are trained; the others may hold anything.
    ratio: ``unit``, each unit's own r = exp(new - old), or ``sequence`` (GSPO, arXiv 2507.18071), one per sample: exp of the mean
    log-ratio over its units. A unit's gradient is that of r A log p with the advantage of its own (section 4.3 there), which for
    one advantage per sample is GSPO's.
    dual_clip (c > 1, arXiv 1912.09729; ``clip`` alone has it): where A < 0 the loss is at most -c A, so that one unlikely unit
    cannot rule the batch.
    reduce: see ``reduce_units``. weights_BK: what each unit's loss is multiplied by at last; None: 1.

    metrics: ratio_min, ratio_max, clip_fraction (``clip``: units where the clipped term decides, so they have no gradient;
    ``cispo``: units whose ratio is bounded), approx_kl (k3 estimate of KL(old || new) from unit ratios), each over the trained
    units.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"clipped_surrogate's dual_clip is {dual_clip}; it bounds ratios from above, so use more than 1")
    if dual_clip is not None and objective != "clip":
        raise ValueError(f"clipped_surrogate's dual_clip belongs to objective 'clip'; with {objective!r} leave it None")
    log_ratio_BK = masked.fill(log_probs_BK - old_log_probs_BK, mask_BK)
    advantages_BK = masked.fill(advantages_BK, mask_BK)
    ratio_BK = _choose(_RATIOS, "ratio", ratio)(log_ratio_BK, mask_BK).exp()
    bounded_BK = ratio_BK.clamp(1 - clip_low, 1 + clip_high)
    measure = _choose(_OBJECTIVES, "objective", objective)
    loss_BK, clipped_BK = measure(ratio_BK, bounded_BK, advantages_BK, masked.fill(log_probs_BK, mask_BK))
    if dual_clip is not None:
        loss_BK = torch.where(advantages_BK < 0, torch.minimum(loss_BK, -dual_clip * advantages_BK), loss_BK)
    if weights_BK is not None:
        loss_BK = loss_BK * masked.fill(weights_BK, mask_BK)
    value = reduce_units(loss_BK, mask_BK, reduce=reduce, normalizer=normalizer)
    with torch.no_grad():
        metrics = {
            "ratio_min": masked.min(ratio_BK, mask_BK),
            "ratio_max": masked.max(ratio_BK, mask_BK),
            "clip_fraction": masked.mean(clipped_BK.to(ratio_BK.dtype), mask_BK),
            "approx_kl": masked.mean(log_ratio_BK.expm1() - log_ratio_BK, mask_BK),
        }
    return Loss(value, metrics)


def _clip(ratio_BK: Tensor, bounded_BK: Tensor, advantages_BK: Tensor, log_probs_BK: Tensor) -> tuple[Tensor, Tensor]:
    free_BK = -advantages_BK * ratio_BK
    clipped_BK = -advantages_BK * bounded_BK
    return torch.maximum(free_BK, clipped_BK), clipped_BK > free_BK


def _cispo(ratio_BK: Tensor, bounded_BK: Tensor, advantages_BK: Tensor, log_probs_BK: Tensor) -> tuple[Tensor, Tensor]:
    return -advantages_BK * bounded_BK.detach() * log_probs_BK, bounded_BK != ratio_BK


def _sequence_log_ratio(log_ratio_BK: Tensor, mask_BK: Tensor) -> Tensor:
    units_B1 = mask_BK.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1 = log_ratio_BK.sum(dim=1, keepdim=True) / units_B1
    return mean_B1.detach() + (log_ratio_BK - log_ratio_BK.detach())  # of the mean's value, of each unit's gradient


def reduce_units(x_BK: Tensor, mask_BK: Tensor, *, reduce: str, normalizer: float | None = None) -> Tensor:
    """A sum over the kept units, weighted by ``reduce`` and divided by ``normalizer``; what is not kept may be anything.

    ``unit_mean``: all units alike; divided by their number. ``sample_mean``: each sample's mean; divided by the number of samples
    with a unit. ``constant`` (Dr.GRPO, arXiv 2503.20783): all units alike; divided by normalizer, which must then be given.
    """
    return _choose(_REDUCTIONS, "reduce", reduce)(x_BK, mask_BK, normalizer)


def _unit_mean(x_BK: Tensor, mask_BK: Tensor, normalizer: float | None) -> Tensor:
    return masked.sum(x_BK, mask_BK) / (masked.count(x_BK, mask_BK) if normalizer is None else normalizer)


def _sample_mean(x_BK: Tensor, mask_BK: Tensor, normalizer: float | None) -> Tensor:
    units_B = mask_BK.sum(dim=1)
    mean_B = masked.fill(x_BK, mask_BK).sum(dim=1) / units_B.clamp(min=1)
    return mean_B.sum() / ((units_B > 0).sum().clamp(min=1) if normalizer is None else normalizer)


def _constant(x_BK: Tensor, mask_BK: Tensor, normalizer: float | None) -> Tensor:
    if normalizer is None:
        raise ValueError("reduce 'constant' divides by normalizer; pass it")
    return masked.sum(x_BK, mask_BK) / normalizer


_RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "unit": lambda log_ratio_BK, mask_BK: log_ratio_BK,
    "sequence": _sequence_log_ratio,
}
_OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"clip": _clip, "cispo": _cispo}
_REDUCTIONS: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "unit_mean": _unit_mean,
    "sample_mean": _sample_mean,
    "constant": _constant,
}


def _choose(table: Mapping[str, F], argument: str, name: str) -> F:
    if name not in table:
        raise ValueError(f"{argument} {name!r} is unknown; use one of {', '.join(sorted(table))}")
    return table[name]


def importance_mismatch(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, max) of |new - old| over the kept units; both 0 at unchanged weights if rollout and training score alike."""
    gap = (log_probs - old_log_probs).detach().abs()
    return masked.mean(gap, mask), masked.fill(gap, mask).max()


@torch.no_grad()
def importance_weights(log_probs_BK: Tensor, engine_log_probs_BK: Tensor, mask_BK: Tensor, *, kind: str, cap: float) -> Tensor:
    """min(p / q, cap) of units that an engine drew with probability q and that have probability p: truncated importance sampling.

    kind: ``token``, each unit's own quotient; ``sequence``, the product over a sample's kept units, for all of them (without
    bias where the cap does not reach, of more variance); ``none``, 1. From Ionides, "Truncated importance sampling" (2008); Yao
    et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), use it between engine and trainer.
    Units that are not kept have weight 1, or their sample's.
    """
    gap_BK = masked.fill(log_probs_BK - engine_log_probs_BK, mask_BK)
    return _choose(_IMPORTANCE, "kind", kind)(gap_BK).exp().clamp(max=cap)


_IMPORTANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "token": lambda gap_BK: gap_BK,
    "sequence": lambda gap_BK: gap_BK.sum(1, keepdim=True).expand_as(gap_BK),
}


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    huber_delta: float | None,
    normalizer: float | None = None,
) -> Loss:
    """PPO's critic loss: the larger of h(R - V) and h(R - V_clip), V_clip = V_old + clamp(V - V_old, -clip, clip); any shape.

    h(e) is Huber: e^2 / 2 up to |e| = huber_delta, linear beyond; huber_delta None is e^2 / 2 everywhere.
    clip None leaves h(R - V). The sum over kept entries is divided by their number, or by ``normalizer``.
    metrics: value_clip_fraction, the share of entries where the clipped term decides.
    """
    loss = _huber(masked.fill(returns - values, mask), huber_delta)
    clipped = torch.zeros_like(loss)
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        clipped = _huber(masked.fill(returns - bounded, mask), huber_delta)
    fraction = masked.mean((clipped > loss).to(loss.dtype), mask)
    return Loss(_unit_mean(torch.maximum(loss, clipped), mask, normalizer), {"value_clip_fraction": fraction})


def _huber(error: Tensor, delta: float | None) -> Tensor:
    if delta is None:
        return 0.5 * error**2
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the kept entries: 1 is a perfect critic, 0 a constant one, below 0 worse than that.

    0 where the returns do not vary, since then there is nothing to explain.
    """
    total = masked.var(returns, mask)
    left = masked.var(returns - values, mask)
    return torch.where(total > 0, 1 - left / total, torch.zeros_like(total))


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str = "k3") -> Tensor:
    """Elementwise estimate of KL(policy || reference) from units the policy drew, with d = log policy - log reference.

    ``k1`` d (unbiased, high variance); ``k2`` d^2 / 2 (biased, its gradient is that of the KL on-policy); ``k3`` exp(-d) - 1 + d
    (unbiased, never negative). From J. Schulman, "Approximating KL Divergence" (2020).
    """
    return _choose(_KL_ESTIMATES, "kind", kind)(log_probs - reference)


_KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * d**2,
    "k3": lambda d: torch.expm1(-d) + d,
}
