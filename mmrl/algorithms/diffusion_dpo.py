"""Diffusion-DPO on the best and the worst picture of each group, as the policy makes them.

    L = -log sigmoid(-beta / 2 ((e_w - e_w,ref) - (e_l - e_l,ref))), e = mean (v(x_t, t) - (noise - x0))^2

with the same noise and time for both of a pair. Wallace et al. 2024 (arXiv 2311.12908), which learns from a data set of pairs;
online, from the best (w) and the worst (l) of a group, it is the ``dpo`` of Flow-GRPO's project. The reference is the policy the
stage started from. Departures: none of the others of a group count; groups without spread are left out.
"""

from __future__ import annotations

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.decoupled import Decoupled, DecoupledConfig, points
from mmrl.algorithms.flow_grpo import FlowGRPO
from mmrl.errors import ConfigError
from mmrl.numerics.matching import dpo_loss, dpo_margin, matching_error
from mmrl.protocols import Advantages, LossContext, VelocityPolicy
from mmrl.types import Batch, Loss, Rollout


class DiffusionDPO(Decoupled):
    """See the module."""

    together = 2

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(DecoupledConfig):
        """Fields of a ``mmrl.algorithms.diffusion_dpo:DiffusionDPO`` block."""

        beta: float = Field(default=2000.0, gt=0)
        """How sharply a difference of errors, which are means over the latent, counts as a preference."""

    def __init__(self, config: Config) -> None:
        judge = FlowGRPO.Config(
            group_size=config.group_size,
            success_range=config.success_range,
            max_refills=config.max_refills,
            compare="best_worst",
        )
        super().__init__(config, FlowGRPO(judge), uses_reference=True)
        self.config = config

    def advantages(self, rollout: Rollout) -> Advantages:
        """1 for the best of a group and -1 for the worst; the others are left out, so that pairs stand side by side."""
        if int(rollout.valid_TB.sum(0).max()) > 1:
            raise ConfigError("diffusion_dpo compares pictures made in one decision, but episodes have several; use nft or awm")
        return super().advantages(rollout)

    def loss(self, policy: VelocityPolicy, batch: Batch, context: LossContext) -> Loss:
        """A pair is the rows 2 i and 2 i + 1 of the batch."""
        config, worth_P2 = self.config, batch.advantages_NJ[:, 0].unflatten(0, (-1, 2))
        best_P = worth_P2.argmax(1)
        assert bool((worth_P2.sum(1) == 0).all()) and context.draws is not None and context.reference is not None
        first_P = torch.arange(0, len(batch), 2, device=worth_P2.device)
        shared = context.draws.select(first_P.repeat_interleave(2))

        def of_pairs(error_N: Tensor) -> tuple[Tensor, Tensor]:
            pairs_P2 = error_N.unflatten(0, (-1, 2))
            return pairs_P2.gather(1, best_P[:, None])[:, 0], pairs_P2.gather(1, 1 - best_P[:, None])[:, 0]

        share = 2 / (context.rows * config.times.count)
        value, right = torch.zeros(()), torch.zeros(())
        for at in points(policy, batch, config.times, shared):
            reference = context.reference.velocity(batch.trace, at.x_t, at.t_N)
            best_reference_P, worst_reference_P = of_pairs(matching_error(reference, at.x0, at.noise))
            best, worst = of_pairs(matching_error(policy.velocity(batch.trace, at.x_t, at.t_N), at.x0, at.noise))
            margin_P = dpo_margin(best, worst, best_reference_P, worst_reference_P, beta=config.beta)
            value = value + share * dpo_loss(margin_P).sum()
            right = right + share * (margin_P.detach() > 0).sum()
        return Loss(value, {"policy_loss": value.detach(), "preferred": right})
