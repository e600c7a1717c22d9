"""PPO: generalised advantage estimation over decisions or their units, clipped policy and value losses, several epochs.

    delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
    A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}          R_t = A_t + V(s_t)
    L = L_policy(A) + c_V mean max(Huber(R - V), Huber(R - V_clipped))

Schulman et al. 2017 (arXiv 1707.06347), GAE: Schulman et al. 2016 (arXiv 1506.02438). As pi_RL applies it to flow policies: one
decision is one step (gamma per decision, the reward of a chunk is the sum over its actions), Huber delta 10, value clip 0.2.
Departures from pi_RL: a truncated episode is bootstrapped from the value of its final observation inside GAE, not by adding to
its reward; the value loss has a weight of its own. RLinf bootstraps only where episodes restart within a rollout; here
``bootstrap_truncated`` says. It decides whether success within a limit is learned at all: with the bootstrap, hovering by the
goal until time is up is worth gamma V, nearly as much as arriving, and that V is never compared with a reward. Without it, what
is left to gain depends on the time that is left (Pardo et al. 2018, arXiv 1712.00378), so a critic should know it: pi0's can
(``critic.inputs`` with ``time``).

Where the critic has a value before each unit (a policy that talks with ``critic.granularity: token``), a step t is a unit: tokens
are worth different amounts within a turn, and what tools show between turns takes no step. That is the PPO of RLHF (Ouyang et al.
2022, arXiv 2203.02155) over a whole conversation. gamma and lambda are then per unit, so the defaults see some twenty tokens far;
1 is usual for both. A decision's reward is its last unit's; a KL in rewards is each unit's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.policy_gradient import PolicyGradientConfig, policy_loss, reference_penalty
from mmrl.numerics import masked
from mmrl.numerics.advantages import gae_of_units, standardize
from mmrl.numerics.losses import explained_variance, value_loss
from mmrl.protocols import Advantages, LikelihoodPolicy, LossContext
from mmrl.types import Batch, Loss, Rollout

ADVANTAGE_EPS = 1e-5  # added to the standard deviation of advantages


class PPO:
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollout", "critic", "likelihood"})
    group_size = 1
    whole_episodes = False

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(PolicyGradientConfig):
        """Fields of a ``mmrl.algorithms.ppo:PPO`` block."""

        gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount per decision; per unit where the critic values units."""
        lam: float = Field(default=0.95, ge=0, le=1)
        """GAE's lambda."""
        bootstrap_truncated: bool = True
        """Whether the value of its last observation is added where a time limit ends an episode. True if the limit is an accident
        of training; false if being done in time is the task: then hovering by the goal must not count as going to reach it."""
        normalize_advantages: Literal["rollout", "minibatch"] | None = "rollout"
        """Standardise advantages over the whole rollout, or over each mini-batch as CleanRL does; null: leave them."""
        value_weight: float = Field(default=1.0, ge=0)
        """Weight of the value loss (c_V)."""
        value_clip: float | None = Field(default=0.2, gt=0)
        """How far a value may move from the rollout's before its loss stops falling; null: as far as it likes."""
        huber_delta: float | None = Field(default=10.0, gt=0)
        """Where the value loss turns from square to linear; null: square everywhere."""
        critic_warmup: int = Field(default=0, ge=0)
        """Iterations at the start of the stage in which the value loss alone counts, so that the critic finds its feet."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.epochs, self.minibatches, self.max_kl = config.epochs, config.minibatches, config.max_kl
        self.uses_reference = config.kl_weight > 0

    def advantages(self, rollout: Rollout) -> Advantages:
        there_TBV, penalty_TBK = rollout.valued_TBV, reference_penalty(self.config, rollout)
        values = rollout.values_TBV.shape[2]
        earned_TBV = None
        if penalty_TBK is not None:
            earned_TBV = -penalty_TBK.unflatten(2, (values, -1)).sum(3).to(rollout.rewards_TB.dtype)
        advantages_TBV, returns_TBV = gae_of_units(
            rollout.rewards_TB,
            rollout.values_TBV,
            rollout.next_values_TB,
            there_TBV,
            rollout.terminated_TB if self.config.bootstrap_truncated else rollout.terminated_TB | rollout.truncated_TB,
            rollout.truncated_TB,
            gamma=self.config.gamma,
            lam=self.config.lam,
            earned_TBV=earned_TBV,
        )
        metrics = {
            "explained_variance": float(explained_variance(rollout.values_TBV, returns_TBV, there_TBV)),
            "advantage_std": float(masked.std(advantages_TBV, there_TBV)),
        }
        if self.config.normalize_advantages == "rollout":
            advantages_TBV = standardize(advantages_TBV, there_TBV, eps=ADVANTAGE_EPS)
        advantages_TB = advantages_TBV.sum(2) / there_TBV.sum(2).clamp(min=1)  # of decisions: the mean over their units
        return Advantages(advantages_TB, returns_TBV, rollout.valid_TB, metrics, advantages_TBV if values > 1 else None)

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Loss:
        scored = policy.evaluate(batch.trace)
        assert scored.values_NV is not None
        if self.config.normalize_advantages == "minibatch":
            batch = _standardised(batch, context)
        actor = policy_loss(self.config, scored, batch, context)
        critic = value_loss(
            scored.values_NV,
            batch.old_values_NV,
            batch.returns_NV,
            batch.trained_NV,
            clip=self.config.value_clip,
            huber_delta=self.config.huber_delta,
            normalizer=context.values,
        )
        value = self.config.value_weight * critic.value
        if context.iteration >= self.config.critic_warmup:  # left out, not weighted by 0: then the actor is not even decayed
            value = value + actor.value
        return Loss(value, {**actor.metrics, **critic.metrics, "value_loss": critic.value.detach()})


def _standardised(batch: Batch, context: LossContext) -> Batch:
    """With the advantages that are learned from on the scale of those of the whole mini-batch."""

    def scaled(x: Tensor) -> Tensor:
        return (x - context.advantage_mean) / (context.advantage_std + ADVANTAGE_EPS)

    units_NK = batch.unit_advantages_NK
    return replace(
        batch, advantages_NJ=scaled(batch.advantages_NJ), unit_advantages_NK=None if units_NK is None else scaled(units_NK)
    )
