"""GRPO: an episode is worth how much better it did than other episodes of the same task.

    A_i = (R_i - mean_G R) / (std_G R + eps), the same for every decision and unit of episode i;  L = L_policy(A)

Shao et al. 2024 (arXiv 2402.03300). Groups are G episodes of one task id, so they share layout and instruction; no critic.
Departures: no KL by default; groups without spread carry no signal and are left out of the loss (and counted), as in DAPO
(arXiv 2503.14476); groups whose success rate is outside ``success_range`` likewise, as pi_RL filters at 0.1-0.9. The loss is the
mean over the decisions that are left, so an episode weighs by its number of decisions (pi_RL can weigh all episodes alike).
A group that the simulator lost an episode of is left out, as if it had not been played.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mmrl.algorithms.policy_gradient import PolicyGradientConfig, policy_loss
from mmrl.numerics.advantages import group_relative
from mmrl.protocols import Advantages, LikelihoodPolicy, LossContext
from mmrl.types import Batch, Loss, Rollout


class GRPO:
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollout", "likelihood"})
    whole_episodes = True

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(PolicyGradientConfig):
        """Fields of a ``mmrl.algorithms.grpo:GRPO`` block."""

        group_size: int = Field(default=8, ge=2)
        """Episodes per task (G); must divide the stage's ``collect.num_envs``."""
        scale: Literal["group_std", "batch_std", "none"] = "group_std"
        """What centred returns are divided by."""
        baseline: Literal["mean", "leave_one_out"] = "mean"
        """The group's mean, or the mean of the other episodes (RLOO)."""
        success_range: tuple[float, float] | None = None
        """Groups whose share of successes lies outside are left out; null: only groups without spread are."""

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.success_range is not None and not 0 <= self.success_range[0] < self.success_range[1] <= 1:
                raise ValueError("success_range must be two shares, low and high, between 0 and 1")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.epochs, self.minibatches, self.max_kl = config.epochs, config.minibatches, config.max_kl
        self.group_size = config.group_size
        self.uses_reference = config.kl_weight > 0

    def advantages(self, rollout: Rollout) -> Advantages:
        """Slots p G .. (p+1) G - 1 hold the episodes of task p, one whole episode each."""
        groups = -1, self.group_size
        returns_B = (rollout.rewards_TB * rollout.valid_TB).sum(0)
        played_B = rollout.valid_TB.any(0)
        success_B = torch.zeros_like(returns_B)
        success_B[played_B] = rollout.episodes.success_M.to(returns_B.dtype)
        returns_PG, success_PG = returns_B.reshape(groups), success_B.reshape(groups)
        complete_P = played_B.reshape(groups).all(1)
        advantages_PG = torch.zeros_like(returns_PG)
        if bool(complete_P.any()):
            advantages_PG[complete_P] = group_relative(
                returns_PG[complete_P], scale=self.config.scale, baseline=self.config.baseline, eps=1e-6
            )
        spread_P = returns_PG.amax(1) - returns_PG.amin(1) > 1e-6
        low, high = self.config.success_range or (0.0, 1.0)
        rate_P = success_PG.float().mean(1)
        in_range_P = (rate_P >= low) & (rate_P <= high)
        keep_B = (complete_P & spread_P & in_range_P).repeat_interleave(self.group_size)
        metrics = {
            "groups_incomplete": float((~complete_P).float().mean()),
            "groups_without_spread": float((complete_P & ~spread_P).float().mean()),
            "groups_out_of_range": float((complete_P & spread_P & ~in_range_P).float().mean()),
        }
        advantages_TB = advantages_PG.reshape(1, -1).expand_as(rollout.rewards_TB)
        return Advantages(advantages_TB, torch.zeros_like(rollout.rewards_TB), rollout.valid_TB & keep_B, metrics)

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Loss:
        return policy_loss(self.config, policy.evaluate(batch.trace), batch, context)
