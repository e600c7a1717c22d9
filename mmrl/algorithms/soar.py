"""SOAR: supervised fine-tuning that also learns to come back from where its own sampler goes wrong.

Given pictures z0 and noise z1, and a time s0:

    L_main = mean (v(z_s0) - (z1 - z0))^2                                   flow matching, as SFT
    z' = z_s0 - (s0 - s1) v_guided(z_s0), without gradients                 one step of the sampler, to s1
    z_s' = (1 - a) z' + a z1, a = (s' - s1) / (1 - s1), s' ~ U(s1, 1)       noised again, with the same noise
    L_aux = mean (v(z_s') - (z_s' - z0) / s')^2                             leads to z0 all the same
    L = (L_main + lambda sum L_aux) / (1 + lambda N), N points

From the public code of SOAR's authors. Where z' is exact the target is z1 - z0, so SFT is its special case. s0 is the logistic
function of a normal number; s1 lies 1 / ``steps`` before it on the schedule. With ``paths`` above 1 there are further z', drawn
from the same place by a stochastic step. Departures: all times weigh the same; s' counts as at least 0.001 where it divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.numerics.flow import interpolate, transition
from mmrl.numerics.matching import matching_error, per_sample, shifted, soar_point, unshifted
from mmrl.protocols import VelocityPolicy
from mmrl.types import Loss, Talks, Trace

_RULE, _NOISE = "flow_sde", 0.5


class SOAR:
    """See the module."""

    needs: ClassVar[frozenset[str]] = frozenset({"examples", "velocity"})

    @dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    class Config:
        """Fields of a ``mmrl.algorithms.soar:SOAR`` block."""

        batch_size: int = Field(default=32, gt=0)
        """Examples per update."""
        aux_weight: float = Field(default=1.0, ge=0)
        """Weight of a further point beside the main one (lambda); 0: SFT."""
        points: int = Field(default=6, gt=0)
        """Further points of each path."""
        steps: int = Field(default=40, gt=0)
        """Steps of the sampler whose one step is rolled out."""
        guidance: float = Field(default=4.5, gt=0)
        """Classifier-free guidance of that step; 1: none."""
        shift: float = Field(default=1.0, gt=0)
        """Shift of the sampler's schedule; SD3 has 3."""
        logit_mean: float = 0.0
        """Mean of the normal number whose logistic function is s0."""
        logit_std: float = Field(default=1.0, gt=0)
        """Its standard deviation."""
        paths: int = Field(default=1, gt=0)
        """Rolled-out steps: the deterministic one, and paths - 1 stochastic ones."""
        path_rule: Literal["flow_sde", "cps", "constant"] = _RULE
        """Rule of the stochastic ones (mmrl.numerics.flow)."""
        path_noise: float = Field(default=_NOISE, gt=0)
        """Their noise level."""

        @model_validator(mode="after")
        def _paths_fit(self) -> Self:
            if self.paths == 1 and (self.path_rule, self.path_noise) != (_RULE, _NOISE):
                raise ValueError(
                    "path_rule and path_noise are of stochastic paths, but paths is 1; raise paths, or leave them out"
                )
            if self.path_rule == "cps" and self.path_noise > 1:
                raise ValueError(f"path_noise is {self.path_noise}, but path_rule 'cps' takes 0 to 1; lower it")
            return self

    def __init__(self, config: Config) -> None:
        self.config, self.batch_size = config, config.batch_size

    def loss(self, policy: VelocityPolicy, examples: Talks, *, share: float, generator: torch.Generator) -> Loss:
        config, trace = self.config, policy.examine(examples)
        clean = policy.clean(trace)
        clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=clean.device)
        normal_N = torch.randn(len(clean), generator=generator, dtype=clean.dtype, device=clean.device)
        t_N = (config.logit_mean + config.logit_std * normal_N).sigmoid()
        x_t = interpolate(clean, noise, t_N)
        main = matching_error(policy.velocity(trace, x_t, t_N), clean, noise).mean()
        value, auxiliary = main, torch.zeros(())
        if config.aux_weight > 0:
            for rolled, from_N in self._rolled(policy, trace, x_t, t_N, generator):
                for _ in range(config.points):
                    u_N = torch.rand(len(clean), generator=generator, dtype=clean.dtype, device=clean.device)
                    to_N = from_N + u_N * (1 - from_N)
                    point, target = soar_point(clean, noise, rolled, from_N, to_N)
                    velocity = policy.velocity(trace, point, to_N).to(clean.dtype)
                    auxiliary = auxiliary + per_sample((velocity - target) ** 2).mean()
            count = config.paths * config.points
            value = (main + config.aux_weight * auxiliary) / (1 + config.aux_weight * count)
            auxiliary = auxiliary.detach() / count
        return Loss(value * share, {"flow_matching": main.detach(), "auxiliary_loss": auxiliary})

    @torch.no_grad()
    def _rolled(
        self, policy: VelocityPolicy, trace: Trace, x_t: Tensor, t_N: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a step of the sampler leads on each path, and to which time."""
        config = self.config
        to_N = shifted((unshifted(t_N, config.shift) - 1 / config.steps).clamp(min=0), config.shift)
        velocity = policy.velocity(trace, x_t, t_N, guidance=config.guidance)
        torch.clear_autocast_cache()  # what it cast of the weights here has no gradient
        yield transition(x_t, velocity, t_N, to_N, rule="ode").mean, to_N
        for _ in range(config.paths - 1):
            step = transition(x_t, velocity, t_N, to_N, rule=config.path_rule, noise_level=config.path_noise)
            noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
            yield step.mean + step.std * noise, to_N
