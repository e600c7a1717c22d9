"""GRPO: an episode is worth how much better it did than other episodes of the same task.

    A_i = (R_i - mean_G R) / (std_G R + eps), the same for every decision and unit of episode i;  L = L_policy(A)

Shao et al. 2024 (arXiv 2402.03300). Groups are G episodes of one task id, so they share layout and instruction; no critic. With
switches for what was proposed since; those of L_policy stand in ``policy_gradient``:

    Dr.GRPO              scale: none (arXiv 2503.20783)
    RLOO                 baseline: leave_one_out, scale: none (arXiv 2402.14740)
    REINFORCE++          baseline: none, scale: whiten, credit: turn, kl_in: reward (arXiv 2501.03262): a unit is worth what
                         follows it, (G - mean) / std over all units of the rollout
    REINFORCE++-baseline scale: whiten: R - mean_G R, then whitened over all units
    DAPO                 max_refills, overlong (arXiv 2503.14476)
    per-turn credit      credit: turn: the return from a decision on, against those of the group's decisions of the same number
    GiGPO                credit: gigpo (arXiv 2505.10978): A_episode + step_weight A_step, where A_step compares the returns from
                         decisions on that the group made in the same state (Observation.anchors_B)

Departures: no KL by default; groups without spread carry no signal and are left out of the loss (and counted), as in DAPO;
groups whose success rate is outside ``success_range`` likewise, as pi_RL filters at 0.1-0.9. Spread and success are judged before
lengths and a KL are counted among the rewards: what a group differs in must be the task. The loss is the mean over the decisions
that are left, so an episode weighs by its number of decisions (pi_RL can weigh all episodes alike).
A group that the simulator lost an episode of is left out, as if it had not been played.
``scale`` and ``baseline`` hold for GiGPO's step groups as for its episode groups (its authors set scale: none); the log says how
many ``states`` there were and how many of them several episodes were in (``states_shared``). A decision that
nothing can be compared with (the only one of its turn, or in its state) is worth 0 there. ``overlong`` counts units that are
trained, over all decisions of an episode, and is taken off the reward of its last decision.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.credit import CREDITS, Credit, Episodes
from mmrl.algorithms.policy_gradient import PolicyGradientConfig, penalised, policy_loss, reference_penalty
from mmrl.numerics.advantages import overlong_penalty, standardize
from mmrl.protocols import Advantages, LikelihoodPolicy, LossContext
from mmrl.types import Batch, Loss, Rollout

EPS = 1e-6  # the spread below which returns are alike


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Overlong:
    """DAPO's soft punishment of long episodes."""

    limit: int = Field(gt=0)
    """Units of an episode from which on the whole punishment is due."""
    buffer: int = Field(gt=0)
    """Units before the limit over which it grows from nothing."""
    weight: float = Field(default=1.0, gt=0)
    """The whole punishment."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> Self:
        if self.buffer > self.limit:
            raise ValueError(f"buffer is {self.buffer}, which is more than limit ({self.limit}); lower buffer")
        return self


class GRPO:
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollout", "likelihood"})
    whole_episodes = True

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config(PolicyGradientConfig):
        """Fields of a ``mmrl.algorithms.grpo:GRPO`` block."""

        group_size: int = Field(default=8, ge=1)
        """Episodes per task (G); must divide the stage's ``collect.num_envs``. At least 2, but for baseline: none."""
        scale: Literal["group_std", "batch_std", "whiten", "none"] = "group_std"
        """What centred returns are divided by; whiten: all units' advantages get mean 0 and deviation 1 together."""
        eps: float = Field(default=1e-6, ge=0)
        """Added to the deviation they are divided by."""
        baseline: Literal["mean", "leave_one_out", "none"] = "mean"
        """The group's mean, the mean of the other episodes (RLOO), or nothing (REINFORCE)."""
        credit: Literal["episode", "turn", "gigpo"] = "episode"
        """What a decision is judged by: the episode's return, the return from it on, or both (see the module)."""
        gamma: float = Field(default=1.0, ge=0, le=1)
        """Discount per decision of the returns from a decision on; credit: episode discounts nothing."""
        step_weight: float = Field(default=1.0, ge=0)
        """Weight of the comparison of decisions made in the same state, for credit: gigpo."""
        success_range: tuple[float, float] | None = None
        """Groups whose share of successes lies outside are left out; null: only groups without spread are."""
        max_refills: int = Field(default=0, ge=0)
        """Rounds in which groups that are left out are replaced by groups of other tasks, until the rollout is full (DAPO)."""
        overlong: Overlong | None = None
        """Punishment of long episodes; null: none."""

        @model_validator(mode="after")
        def _ordered(self) -> Self:
            if self.success_range is not None and not 0 <= self.success_range[0] < self.success_range[1] <= 1:
                raise ValueError("success_range must be two shares, low and high, between 0 and 1")
            return self

        @model_validator(mode="after")
        def _credit_fits(self) -> Self:
            if self.credit == "episode" and self.gamma != 1:
                raise ValueError(f"gamma is {self.gamma}, but credit 'episode' discounts nothing; set credit: turn, or gamma: 1")
            if self.credit != "gigpo" and self.step_weight != 1:
                raise ValueError(f"step_weight is {self.step_weight}, but credit '{self.credit}' does not read it; leave it out")
            return self

        @model_validator(mode="after")
        def _baseline_fits(self) -> Self:
            if self.baseline != "none":
                if self.group_size < 2:
                    raise ValueError(
                        f"group_size is 1, but baseline '{self.baseline}' compares episodes; use 2 or more, or set baseline: none"
                    )
                return self
            if self.scale in ("group_std", "batch_std"):
                raise ValueError(f"baseline 'none' leaves nothing centred for scale '{self.scale}'; set scale: whiten (or none)")
            if self.credit == "gigpo":
                raise ValueError("baseline 'none' compares nothing, but credit 'gigpo' compares decisions; set baseline: mean")
            if self.max_refills and self.success_range is None:
                raise ValueError("max_refills replaces groups without spread, but baseline 'none' needs no spread; leave it out")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config
        self.epochs, self.minibatches, self.max_kl = config.epochs, config.minibatches, config.max_kl
        self.group_size, self.max_refills = config.group_size, config.max_refills
        self.uses_reference, self.judges_by_reference = config.kl_weight > 0, config.kl_in == "reward"

    def taught(self, rollout: Rollout) -> Tensor:
        return self._groups(rollout).taught_P.repeat_interleave(self.group_size)

    def advantages(self, rollout: Rollout) -> Advantages:
        """Slots p G .. (p+1) G - 1 hold the episodes of task p, one whole episode each."""
        groups, config = self._groups(rollout), self.config
        keep_TB = rollout.valid_TB & groups.taught_P.repeat_interleave(self.group_size)
        penalty_TBK = reference_penalty(config, rollout)
        overlong_B = self._overlong(rollout)
        rewards_TB = penalised(rollout.rewards_TB, penalty_TBK) + _at_the_end(overlong_B, rollout.valid_TB)
        episodes = self._episodes(rollout, rewards_TB, groups.complete_P)
        advantages_TB, metrics = self._credit(rollout, episodes)
        units_TBK = self._units(rollout, advantages_TB, penalty_TBK, keep_TB)
        punished = {} if config.overlong is None else {"episodes_overlong": float((overlong_B < 0).float().mean())}
        return Advantages(advantages_TB, None, keep_TB, {**groups.metrics(), **metrics, **punished}, units_TBK)

    def loss(self, policy: LikelihoodPolicy, batch: Batch, context: LossContext) -> Loss:
        return policy_loss(self.config, policy.evaluate(batch.trace), batch, context)

    def _credit(self, rollout: Rollout, episodes: Episodes) -> Credit:
        """What each decision was worth."""
        config = self.config
        return CREDITS[config.credit](
            episodes,
            scale="none" if config.scale == "whiten" else config.scale,
            baseline=config.baseline,
            step_weight=config.step_weight,
            eps=config.eps,
        )

    def _episodes(self, rollout: Rollout, rewards_TB: Tensor, complete_P: Tensor) -> Episodes:
        return Episodes(rewards_TB * rollout.valid_TB, rollout.valid_TB, rollout.anchor_TB, complete_P, self.config.gamma)

    def _overlong(self, rollout: Rollout) -> Tensor:
        """What is added to the return of each slot's episode for its length: [B]."""
        overlong, lengths_B = self.config.overlong, (rollout.mask_TBK & rollout.valid_TB[..., None]).sum((0, 2))
        if overlong is None:
            return torch.zeros_like(rollout.rewards_TB[0])
        punishment_B = overlong_penalty(lengths_B, limit=overlong.limit, buffer=overlong.buffer)
        return (overlong.weight * punishment_B).to(rollout.rewards_TB.dtype)

    def _units(self, rollout: Rollout, advantages_TB: Tensor, penalty_TBK: Tensor | None, keep_TB: Tensor) -> Tensor | None:
        """What units are worth where those of a decision differ, or are whitened together."""
        config, units_TBK = self.config, advantages_TB[..., None].expand(rollout.mask_TBK.shape)
        follows = penalty_TBK is not None and config.baseline == "none" and config.credit == "turn"
        if penalty_TBK is not None and follows:
            units_TBK = units_TBK + (penalty_TBK.cumsum(2) - penalty_TBK)  # what was paid before a unit does not follow it
        if config.scale == "whiten":
            return standardize(units_TBK, rollout.mask_TBK & keep_TB[..., None], eps=config.eps)
        return units_TBK if follows else None

    def _groups(self, rollout: Rollout) -> _Groups:
        """Which groups are whole, spread, and in the range; of the environment's own rewards."""
        played_B = rollout.valid_TB.any(0)
        success_B = torch.zeros_like(rollout.rewards_TB[0])
        success_B[played_B] = rollout.episodes.success_M.to(success_B.dtype)
        complete_P = played_B.reshape(-1, self.group_size).all(1)
        low, high = self.config.success_range or (0.0, 1.0)
        rate_P = success_B.reshape(-1, self.group_size).float().mean(1)
        in_range_P = (rate_P >= low) & (rate_P <= high)
        if self.config.baseline == "none":
            return _Groups(complete_P, torch.ones_like(complete_P), in_range_P)
        spread_P = self._episodes(rollout, rollout.rewards_TB, complete_P).spread(self.config.credit) > EPS
        return _Groups(complete_P, spread_P, in_range_P)


def _at_the_end(x_B: Tensor, valid_TB: Tensor) -> Tensor:
    """[T, B], x in the last decision of each slot's episode and 0 in the others."""
    last_TB = valid_TB & (valid_TB.cumsum(0) == valid_TB.sum(0))
    return torch.where(last_TB, x_B, 0)


class _Groups(NamedTuple):
    complete_P: Tensor
    spread_P: Tensor
    in_range_P: Tensor

    @property
    def taught_P(self) -> Tensor:
        return self.complete_P & self.spread_P & self.in_range_P

    def metrics(self) -> dict[str, float]:
        shares = {
            "groups_incomplete": ~self.complete_P,
            "groups_without_spread": self.complete_P & ~self.spread_P,
            "groups_out_of_range": self.complete_P & self.spread_P & ~self.in_range_P,
        }
        return {name: float(chosen_P.float().mean()) for name, chosen_P in shares.items()}
