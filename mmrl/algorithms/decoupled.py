"""What the algorithms share that regress a velocity field on the pictures a policy made, by how these did in their group.

The rollout may be made by any sampler: no step of it is scored again. Each picture x0 is noised anew to M times t_m, with

    x_m = (1 - t_m) x0 + t_m noise_m

and the fields of the policy, of the policy that collected and of the reference are compared there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.algorithms.grpo import GRPO
from mmrl.numerics.draws import Draws
from mmrl.numerics.flow import interpolate
from mmrl.numerics.matching import per_sample, shifted
from mmrl.protocols import Advantages, Decay, VelocityField, VelocityPolicy
from mmrl.types import Batch, Rollout


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Times:
    """At which times fields are compared."""

    count: int = Field(default=1, gt=0)
    """Times of each picture in an update (M)."""
    distribution: Literal["uniform", "strata", "logit_normal"] = "strata"
    """uniform: anywhere between 0 and 1; strata: one in each of ``count`` equal parts, as the steps of a sampler lie;
    logit_normal: the logistic function of a normal number (SD3's training)."""
    shift: float = Field(default=1.0, gt=0)
    """Shift of the schedule: t becomes shift t / (1 + (shift - 1) t); SD3 has 3."""

    def draw(self, draws: Draws) -> Tensor:
        """Times of each row: float64 [N, M]."""
        if self.distribution == "logit_normal":
            return shifted(draws.normal(self.count, dtype=torch.float64).sigmoid(), self.shift)
        u_NM = draws.uniform(self.count, dtype=torch.float64)
        if self.distribution == "strata":
            u_NM = (u_NM + torch.arange(self.count, device=u_NM.device)) / self.count
        return shifted(u_NM, self.shift)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EMADecay:
    """How much of an average stays at iteration n: 0 before ``start``, then min(rate (n - start), limit)."""

    start: int = Field(default=0, ge=0)
    """Iteration from which on it averages; before, it is the policy as it is."""
    rate: float = Field(default=0.001, gt=0)
    """By how much the decay grows in an iteration; 1: at once to its limit."""
    limit: float = Field(default=0.5, ge=0, lt=1)
    """The largest decay."""

    def __call__(self, iteration: int) -> float:
        return min(self.rate * max(iteration - self.start, 0), self.limit)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DecoupledConfig:
    """Fields they all have."""

    epochs: int = Field(default=1, gt=0)
    """Passes over each rollout."""
    minibatches: int = Field(default=1, gt=0)
    """Optimizer updates per pass."""
    group_size: int = Field(default=24, ge=2)
    """Pictures per prompt (G); must divide the stage's ``collect.num_envs``."""
    success_range: tuple[float, float] | None = None
    """Groups whose share of successes lies outside are left out; null: only groups without spread are."""
    max_refills: int = Field(default=0, ge=0)
    """Rounds in which groups that are left out are replaced by groups of other tasks, until the rollout is full (DAPO)."""
    times: Times = Field(default_factory=Times)
    """At which times fields are compared."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ScaledConfig(DecoupledConfig):
    """Of those that weigh pictures by advantages: A = clamp((R - mean_G R) / (std R + eps), -clamp, clamp)."""

    scale: Literal["group_std", "batch_std", "none"] = "batch_std"
    """What centred returns are divided by: the deviation of the group's, or of all of the rollout; or nothing."""
    eps: float = Field(default=1e-4, ge=0)
    """Added to that deviation."""
    clamp: float = Field(default=5.0, gt=0)
    """Largest advantage, of either sign."""


class Point(NamedTuple):
    """Where fields are compared: one of M."""

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t_N: Tensor


def points(policy: VelocityPolicy, batch: Batch, times: Times, draws: Draws | None) -> Iterator[Point]:
    """The M noised pictures of a batch; the numbers of a row belong to its stream."""
    assert draws is not None and batch.advantages_NJ.shape[1] == 1
    x0 = policy.clean(batch.trace)
    dtype = torch.promote_types(x0.dtype, torch.float32)
    for t_N in times.draw(draws).to(dtype).unbind(1):
        noise = draws.normal(*x0.shape[1:], dtype=dtype)
        yield Point(x0, noise, interpolate(x0, noise, t_N), t_N)


def field_distance(velocity: Tensor, other: VelocityField | None, batch: Batch, at: Point) -> Tensor:
    """mean (v - v_other)^2 of each sample: [N]."""
    assert other is not None
    dtype = at.x_t.dtype
    return per_sample((velocity.to(dtype) - other.velocity(batch.trace, at.x_t, at.t_N).to(dtype)) ** 2)


class Decoupled:
    """Groups and advantages as GRPO has them; a subclass has the loss, and says which averages it needs."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollout", "velocity"})
    whole_episodes = True
    max_kl = None
    judges_by_reference = False
    together = 1
    behaviour: Decay | None = None
    average: Decay | None = None

    def __init__(self, config: DecoupledConfig, judge: GRPO, *, uses_reference: bool) -> None:
        self._judge, self.uses_reference = judge, uses_reference
        self.epochs, self.minibatches = config.epochs, config.minibatches
        self.group_size, self.max_refills = config.group_size, config.max_refills

    def taught(self, rollout: Rollout) -> Tensor:
        return self._judge.taught(rollout)

    def advantages(self, rollout: Rollout) -> Advantages:
        return self._judge.advantages(rollout)


def scaled_judge(config: ScaledConfig) -> GRPO:
    return GRPO(
        GRPO.Config(
            group_size=config.group_size,
            success_range=config.success_range,
            max_refills=config.max_refills,
            scale=config.scale,
            eps=config.eps,
        )
    )
