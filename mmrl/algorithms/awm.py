"""Advantage weighted matching (AWM): a policy gradient whose likelihood is minus the flow-matching loss.

    log p := -w(t, l), l = mean (v(x_t, t) - (noise - x0))^2
    L = mean max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(log p - log p_old) at the same noise and time
        + c_KL mean (v - v_other)^2

Xue et al. 2025 (arXiv 2509.25050). At ratio 1 its gradient is A times that of weighted flow matching. Any sampler may collect.
v_other is the policy the stage started from, or an average of it since (``kl_to: average``), which its authors advise.
Departures: groups without spread are left out; of the weightings huber and power only the names are theirs (see
numerics.matching.matching_log_prob).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.algorithms.decoupled import Decoupled, EMADecay, Point, ScaledConfig, field_distance, points, scaled_judge
from mmrl.numerics.losses import clipped_surrogate
from mmrl.numerics.matching import matching_error, matching_log_prob
from mmrl.protocols import LossContext, VelocityPolicy
from mmrl.types import Batch, Loss

_POWER = 0.25


class AWM(Decoupled):
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(ScaledConfig):
        """Fields of a ``mmrl.algorithms.awm:AWM`` block."""

        clip_low: float = Field(default=1e-5, gt=0)
        """Ratios below 1 - clip_low earn nothing further."""
        clip_high: float = Field(default=1e-5, gt=0)
        """Ratios above 1 + clip_high earn nothing further."""
        weighting: Literal["uniform", "time", "time_squared", "huber", "power"] = "uniform"
        """w, what the loss at a time counts."""
        power: float = Field(default=_POWER, gt=0, lt=1)
        """Exponent of weighting: power."""
        kl_weight: float = Field(default=0.0, ge=0)
        """Weight of the squared distance from another field."""
        kl_to: Literal["reference", "average"] = "reference"
        """Whose field: of the policy the stage started from, or of a running average of the policy."""
        average: EMADecay | None = None
        """How much of that average stays at an iteration; null with kl_to: reference."""

        @model_validator(mode="after")
        def _average_fits(self) -> Self:
            if self.kl_to == "average" and (self.average is None or self.kl_weight == 0):
                raise ValueError("kl_to is 'average', which needs average (how slowly it moves) and kl_weight above 0; set both")
            if self.kl_to != "average" and self.average is not None:
                raise ValueError("average is set, but kl_to is 'reference', which does not read it; leave it out")
            if self.weighting != "power" and self.power != _POWER:
                raise ValueError(f"power is set, but weighting '{self.weighting}' does not read it; leave it out")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config, scaled_judge(config), uses_reference=config.kl_weight > 0 and config.kl_to == "reference")
        self.config, self.average = config, config.average
        self.behaviour = EMADecay(limit=0.0)  # the policy as it collects

    def loss(self, policy: VelocityPolicy, batch: Batch, context: LossContext) -> Loss:
        config, count = self.config, self.config.times.count
        share = 1 / (context.rows * count)
        advantages_N = batch.advantages_NJ[:, 0].clamp(-config.clamp, config.clamp)
        value, metrics = torch.zeros(()), {}
        for at in points(policy, batch, config.times, context.draws):
            assert context.behaviour is not None
            old_N = self._log_prob(context.behaviour.velocity(batch.trace, at.x_t, at.t_N), at)
            velocity = policy.velocity(batch.trace, at.x_t, at.t_N)
            surrogate = clipped_surrogate(
                self._log_prob(velocity, at)[:, None],
                old_N[:, None],
                advantages_N[:, None],
                torch.ones_like(old_N, dtype=torch.bool)[:, None],
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                normalizer=context.rows * count,
            )
            value = value + surrogate.value
            terms = {name: share * len(batch) * surrogate.metrics[name] for name in ("clip_fraction", "approx_kl")}
            terms["policy_loss"] = surrogate.value.detach()
            if config.kl_weight > 0:
                other = context.average if config.kl_to == "average" else context.reference
                distance = share * field_distance(velocity, other, batch, at).sum()
                value, terms["kl_reference"] = value + config.kl_weight * distance, distance.detach()
            metrics = {name: metrics.get(name, 0) + term for name, term in terms.items()}
        return Loss(value, metrics)

    def _log_prob(self, velocity: torch.Tensor, at: Point) -> torch.Tensor:
        error_N = matching_error(velocity, at.x0, at.noise)
        return matching_log_prob(error_N, at.t_N, weighting=self.config.weighting, power=self.config.power)
