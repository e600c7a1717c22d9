"""What PPO and GRPO share: the clipped surrogate over a decision's units, an entropy bonus and a KL term.

    L_policy = mean_units max(-A rho, -A clip(rho, 1 - c_low, 1 + c_high)) - c_H H + c_KL KL(policy || reference)

rho is the ratio of a unit's probability to its probability at rollout (Schulman et al. 2017, arXiv 1707.06347).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.numerics.losses import clipped_surrogate, importance_mismatch, kl_estimate
from mmrl.protocols import LossContext
from mmrl.types import Batch, Evaluation, Loss


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PolicyGradientConfig:
    """Fields every policy-gradient algorithm has."""

    epochs: int = Field(default=1, gt=0)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer updates per pass."""
    clip_low: float = Field(default=0.2, gt=0)
    """Ratios below 1 - clip_low earn nothing further."""
    clip_high: float = Field(default=0.2, gt=0)
    """Ratios above 1 + clip_high earn nothing further."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages, as a multiple of |A| (Ye et al. 2020); null: none."""
    ratio: Literal["unit", "sequence"] = "unit"
    """One ratio per unit, or their geometric mean over the decision (GSPO)."""
    reduce: Literal["unit_mean", "sample_mean"] = "unit_mean"
    """Average over all units alike, or first within each decision."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus; moves only policies whose noise is learned."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the policy the stage started from."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of that KL."""
    max_kl: float | None = Field(default=None, gt=0)
    """Leave out the remaining updates of a rollout once the approximate KL to the rollout policy exceeds this."""


def policy_loss(config: PolicyGradientConfig, scored: Evaluation, batch: Batch, context: LossContext) -> Loss:
    """This micro-batch's share of L_policy."""
    mask = batch.mask_NK
    surrogate = clipped_surrogate(
        scored.log_probs_NK,
        batch.old_log_probs_NK,
        batch.per_unit(batch.advantages_NJ),
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        ratio=config.ratio,
        reduce=config.reduce,
        normalizer=context.units if config.reduce == "unit_mean" else context.samples,
    )
    entropy = (scored.entropy_NK * mask).sum() / context.units
    value = surrogate.value - config.entropy_weight * entropy
    metrics: dict[str, Tensor | float] = dict(surrogate.metrics)
    metrics |= {"policy_loss": surrogate.value.detach(), "entropy": entropy.detach()}
    if batch.reference_log_probs_NK is not None:
        kl = kl_estimate(scored.log_probs_NK, batch.reference_log_probs_NK, kind=config.kl_kind)
        kl_mean = (kl * mask).sum() / context.units
        value = value + config.kl_weight * kl_mean
        metrics["kl_reference"] = kl_mean.detach()
    mean, largest = importance_mismatch(scored.log_probs_NK, batch.old_log_probs_NK, mask)
    return Loss(value, metrics | {"log_prob_gap": mean, "log_prob_gap_max": largest})
