"""PPO: generalised advantage estimation over decisions, clipped policy and value losses, several epochs.

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
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from mmrl.algorithms.policy_gradient import PolicyGradientConfig, penalised, policy_loss, reference_penalty
from mmrl.numerics.advantages import gae, standardize
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
        """Discount per decision."""
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
        advantages_TB, returns_TB = gae(
            penalised(rollout.rewards_TB, reference_penalty(self.config, rollout)),
            rollout.values_TB,
            rollout.next_values_TB,
            rollout.terminated_TB if self.config.bootstrap_truncated else rollout.terminated_TB | rollout.truncated_TB,
            rollout.truncated_TB,
            gamma=self.config.gamma,
            lam=self.config.lam,
        )
        keep = rollout.valid_TB
        metrics = {
            "explained_variance": float(explained_variance(rollout.values_TB, returns_TB, keep)),
            "advantage_std": float(advantages_TB[keep].std()) if int(keep.sum()) > 1 else 0.0,
        }
        if self.config.normalize_advantages == "rollout":
            advantages_TB = standardize(advantages_TB, keep, eps=ADVANTAGE_EPS)
        return Advantages(advantages_TB, returns_TB, keep, metrics)

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Loss:
        scored = policy.evaluate(batch.trace)
        assert scored.values_NJ is not None
        if self.config.normalize_advantages == "minibatch":
            scaled_NJ = (batch.advantages_NJ - context.advantage_mean) / (context.advantage_std + ADVANTAGE_EPS)
            batch = replace(batch, advantages_NJ=scaled_NJ)
        actor = policy_loss(self.config, scored, batch, context)
        critic = value_loss(
            scored.values_NJ,
            batch.old_values_NJ,
            batch.returns_NJ,
            batch.trained_NJ,
            clip=self.config.value_clip,
            huber_delta=self.config.huber_delta,
            normalizer=context.decisions,
        )
        value = self.config.value_weight * critic.value
        if context.iteration >= self.config.critic_warmup:  # left out, not weighted by 0: then the actor is not even decayed
            value = value + actor.value
        return Loss(value, {**actor.metrics, **critic.metrics, "value_loss": critic.value.detach()})
