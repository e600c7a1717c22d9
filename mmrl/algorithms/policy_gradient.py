"""What PPO and GRPO share: a surrogate with bounded ratios over units, an entropy bonus and a KL term.

    clip:   L_policy = mean_units max(-A rho, -A clip(rho, 1 - c_low, 1 + c_high)) - c_H H + c_KL KL(policy || reference)
    cispo:  the first term is mean_units -A sg(clip(rho, 1 - c_low, 1 + c_high)) log pi

rho is the ratio of a unit's probability to its probability at rollout (Schulman et al. 2017, arXiv 1707.06347). A sample is what
the policy scores in one piece (Packing): a decision of a robot's, a whole conversation of one that talks. The switches, by the
papers they come from:

    DAPO        clip_high above clip_low (arXiv 2503.14476 has 0.28 and 0.2), reduce: unit_mean
    GRPO        reduce: sample_mean (arXiv 2402.03300)
    Dr.GRPO     reduce: constant, units_per_sample: the longest sample there can be (arXiv 2503.20783)
    GSPO        ratio: sequence, reduce: sample_mean (arXiv 2507.18071): one ratio for all units of all decisions of a sample
    CISPO       objective: cispo, clip_low: 1 (no bound below), clip_high: 4 (arXiv 2506.13585 gives no numbers)
    dual clip   dual_clip (arXiv 1912.09729)
    TIS         importance: token or sequence (see numerics.losses.importance_weights)

Where the decisions of a sample are worth different amounts, GSPO's one ratio weighs and clips each unit with the advantage of
its own (GSPO-token). Where another program draws (an engine with the policy's weights), pi_old is the policy's own as well, and
what the engine's q differs from it is made up for by the factor min(pi_old / q, cap) of the first term. ``kl_in: reward`` takes
c_KL KL off the rewards, unit by unit, before anything is made of them, as RLHF does; the KL is then that of the rollout's
policy, and no gradient runs through it. A KL in the loss is averaged as ``reduce`` says, the entropy over units;
``kl_corrected`` is DeepSeek-V3.2's (arXiv 2512.02556; TRL does so unless told otherwise). Departure: an average over samples is
over those that are trained, where TRL's also counts the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.numerics import masked
from mmrl.numerics.losses import clipped_surrogate, importance_mismatch, importance_weights, kl_estimate, reduce_units
from mmrl.protocols import LossContext
from mmrl.types import Batch, Evaluation, Loss, Rollout


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PolicyGradientConfig:
    """Fields every policy-gradient algorithm has."""

    epochs: int = Field(default=1, gt=0)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer updates per pass."""
    objective: Literal["clip", "cispo"] = "clip"
    """PPO's clipped surrogate, or REINFORCE weighted by the bounded ratio."""
    clip_low: float = Field(default=0.2, gt=0)
    """Ratios below 1 - clip_low earn nothing further (cispo: count as that); 1 or more: no bound."""
    clip_high: float = Field(default=0.2, gt=0)
    """Ratios above 1 + clip_high earn nothing further (cispo: count as that)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of negative advantages, as a multiple of |A| (Ye et al. 2020); null: none."""
    ratio: Literal["unit", "sequence"] = "unit"
    """One ratio per unit, or their geometric mean over the whole sample, all of its decisions (GSPO)."""
    reduce: Literal["unit_mean", "sample_mean", "constant"] = "unit_mean"
    """Average over all units alike, or first within each sample; or sum within each sample and divide by units_per_sample."""
    units_per_sample: float | None = Field(default=None, gt=0)
    """What a sample's sum is divided by with reduce: constant, whatever its length (Dr.GRPO); null with the others."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus; moves only policies whose noise is learned."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the policy the stage started from (one that talks may name another: ``policy.reference``)."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of that KL; in rewards, k1 is the usual one."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether the KL is a term of the loss, or taken off the rewards."""
    kl_corrected: bool = False
    """Weigh each unit's KL in the loss by its ratio, so that the gradient is the KL's although the rollout's policy drew it."""
    importance: Literal["none", "token", "sequence"] = "token"
    """Where an engine draws that is not the policy itself: weigh a unit's loss by its policy / engine probability, by the product
    of those of its whole sample, or not at all. Of no effect where the policy draws itself."""
    importance_cap: float = Field(default=2.0, ge=1)
    """Bound on that weight."""
    max_kl: float | None = Field(default=None, gt=0)
    """Leave out the remaining updates of a rollout once the approximate KL to the rollout policy exceeds this."""

    @model_validator(mode="after")
    def _surrogate_fits(self) -> Self:
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip is {self.dual_clip}, but objective 'cispo' is bounded by clip_high; set dual_clip: null")
        if self.reduce == "constant" and self.units_per_sample is None:
            raise ValueError("reduce 'constant' divides by units_per_sample; set it, to the longest sample there can be, say")
        if self.reduce != "constant" and self.units_per_sample is not None:
            raise ValueError(f"units_per_sample is set, but reduce '{self.reduce}' does not read it; set reduce: constant")
        if self.kl_in == "reward" and self.kl_weight == 0:
            raise ValueError("kl_in is 'reward', but kl_weight is 0, so that there is no KL; raise kl_weight")
        if self.kl_corrected and (self.kl_in == "reward" or self.kl_weight == 0):
            raise ValueError("kl_corrected weighs a KL in the loss; set kl_in: loss and kl_weight above 0, or leave it out")
        return self


# What the sum over a mini-batch is divided by.
_NORMALIZERS: dict[str, Callable[[PolicyGradientConfig, LossContext], float]] = {
    "unit_mean": lambda config, context: context.units,
    "sample_mean": lambda config, context: context.samples,
    "constant": lambda config, context: context.samples * (config.units_per_sample or 1),
}


def by_unit(config: PolicyGradientConfig) -> bool:
    """Whether L_policy is a sum over units, of which each reads its own numbers alone."""
    return config.reduce != "sample_mean" and config.ratio == "unit" and config.importance != "sequence"


def reference_penalty(config: PolicyGradientConfig, rollout: Rollout) -> Tensor | None:
    """What each unit's distance from the reference takes off its decision's reward [T, B, K]; None where rewards know no KL."""
    if config.kl_weight == 0 or config.kl_in != "reward":
        return None
    assert rollout.reference_log_probs_TBK is not None
    kl_TBK = kl_estimate(rollout.log_probs_TBK, rollout.reference_log_probs_TBK, kind=config.kl_kind)
    return config.kl_weight * masked.fill(kl_TBK, rollout.mask_TBK & rollout.valid_TB[..., None])


def penalised(rewards_TB: Tensor, penalty_TBK: Tensor | None) -> Tensor:
    """Rewards of decisions less the penalties of their units."""
    return rewards_TB if penalty_TBK is None else rewards_TB - penalty_TBK.sum(2).to(rewards_TB.dtype)


def policy_loss(
    config: PolicyGradientConfig,
    scored: Evaluation,
    batch: Batch,
    context: LossContext,
    *,
    log_ratio_NK: Tensor | None = None,
    weights_NK: Tensor | None = None,
    kl_NK: Tensor | None = None,
) -> Loss:
    """This micro-batch's share of L_policy.

    log_ratio_NK: what takes the place of log p - log p_old in the surrogate. weights_NK: what each unit's surrogate is multiplied
    by. kl_NK: the KL from the reference, where it is known and need not be estimated. None: nothing of the kind.
    """
    mask, normalizer = batch.mask_NK, _NORMALIZERS[config.reduce](config, context)
    weights, engine_metrics = _importance(config, batch)
    if weights_NK is not None:
        weights = weights_NK if weights is None else weights * weights_NK
    surrogate = clipped_surrogate(
        scored.log_probs_NK if log_ratio_NK is None else log_ratio_NK,
        batch.old_log_probs_NK if log_ratio_NK is None else torch.zeros_like(batch.old_log_probs_NK),
        batch.advantages_NK,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        objective=config.objective,
        ratio=config.ratio,
        reduce=config.reduce,
        normalizer=normalizer,
        weights_BK=weights,
    )
    entropy = masked.sum(scored.entropy_NK, mask) / context.units
    value = surrogate.value - config.entropy_weight * entropy
    metrics: dict[str, Tensor | float] = {**surrogate.metrics, **engine_metrics}
    metrics |= {"policy_loss": surrogate.value.detach(), "entropy": entropy.detach()}
    if batch.reference_log_probs_NK is not None:
        kl = kl_NK if kl_NK is not None else kl_estimate(scored.log_probs_NK, batch.reference_log_probs_NK, kind=config.kl_kind)
        metrics["kl_reference"] = masked.sum(kl, mask).detach() / context.units
        if config.kl_corrected:
            kl = kl * masked.fill(scored.log_probs_NK - batch.old_log_probs_NK, mask).exp()
        if config.kl_in == "loss":
            kl_mean = reduce_units(kl, mask, reduce=config.reduce, normalizer=normalizer)
            value = value + config.kl_weight * kl_mean
    mean, largest = importance_mismatch(scored.log_probs_NK, batch.old_log_probs_NK, mask)
    return Loss(value, metrics | {"log_prob_gap": mean, "log_prob_gap_max": largest})


def _importance(config: PolicyGradientConfig, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What makes up for an engine that drew the units, and how far it is from the policy; nothing where the policy drew them."""
    engine, mask = batch.engine_log_probs_NK, batch.mask_NK
    if engine is None:
        return None, {}
    weights = importance_weights(batch.old_log_probs_NK, engine, mask, kind=config.importance, cap=config.importance_cap)
    mean, largest = importance_mismatch(batch.old_log_probs_NK, engine, mask)
    return weights, {
        "engine_gap": mean,
        "engine_gap_max": largest,
        "engine_weight": masked.mean(weights, mask),
        "engine_capped": masked.mean((weights == config.importance_cap).to(weights.dtype), mask),
    }
