"""DiffusionNFT: the velocity field is drawn towards good pictures and away from bad ones, without likelihoods.

    r = clamp(A / c, -1, 1) / 2 + 1/2, A as in GRPO
    v+ = B v + (1 - B) v_old        v- = (1 + B) v_old - B v
    L = c / B (r d(v+) + (1 - r) d(v-)) + c_KL mean (v - v_ref)^2
    d(u) = mean (x_t - t u - x0)^2 / sg(mean |x_t - t u - x0|)

Zheng et al. 2025 (arXiv 2509.16117). v_old is an average of the policy, which also collects; before the rollout of iteration n it
keeps ``behaviour``(n) of itself: min(0.001 n, 0.5) for GenEval and preferences (the default), or start: 75, rate: 0.0075, limit:
0.999 for OCR. Any sampler may collect; theirs is deterministic, without guidance.
Departures: n counts iterations of the stage, not optimizer steps; groups without spread are left out; times are drawn in strata,
one a step of a sampler, instead of being those of the sampler.
"""

from __future__ import annotations

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.algorithms.decoupled import Decoupled, EMADecay, ScaledConfig, field_distance, points, scaled_judge
from mmrl.numerics.matching import nft_loss, per_sample
from mmrl.protocols import LossContext, VelocityPolicy
from mmrl.types import Batch, Loss


class DiffusionNFT(Decoupled):
    """See the module."""

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(ScaledConfig):
        """Fields of a ``mmrl.algorithms.nft:DiffusionNFT`` block."""

        strength: float = Field(default=1.0, gt=0)
        """How far v+ and v- lie from v_old (B); 0.1 for OCR and several rewards."""
        kl_weight: float = Field(default=1e-4, ge=0)
        """Weight of the squared distance from the policy the stage started from."""
        behaviour: EMADecay = Field(default_factory=EMADecay)
        """How much of v_old stays at an iteration."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, scaled_judge(config), uses_reference=config.kl_weight > 0)
        self.config, self.behaviour = config, config.behaviour

    def loss(self, policy: VelocityPolicy, batch: Batch, context: LossContext) -> Loss:
        config = self.config
        preference_N = (batch.advantages_NJ[:, 0] / config.clamp).clamp(-1, 1) / 2 + 0.5
        share = 1 / (context.rows * config.times.count)
        value, metrics = torch.zeros(()), {}
        for at in points(policy, batch, config.times, context.draws):
            assert context.behaviour is not None
            old = context.behaviour.velocity(batch.trace, at.x_t, at.t_N)
            velocity = policy.velocity(batch.trace, at.x_t, at.t_N)
            each_N = nft_loss(velocity, old, at.x_t, at.x0, at.t_N, preference_N, strength=config.strength)
            policy_loss = config.clamp * share * each_N.sum()
            shift = share * per_sample((velocity.detach() - old) ** 2).sum()
            value, terms = value + policy_loss, {"policy_loss": policy_loss.detach(), "velocity_shift": shift}
            if config.kl_weight > 0:
                distance = share * field_distance(velocity, context.reference, batch, at).sum()
                value, terms["kl_reference"] = value + config.kl_weight * distance, distance.detach()
            metrics = {name: metrics.get(name, 0) + term for name, term in terms.items()}
        return Loss(value, metrics)
