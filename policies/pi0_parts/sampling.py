"""How a pi0 draws its denoising chain at random, and the likelihood of what it drew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.numerics import flow
from mmrl.numerics.draws import Draws


@dataclass(frozen=True)
class Sampler:
    """The rule of a chain of ``steps`` denoising steps (K), and how its log-densities become units.

    Fields are those of ``policies.pi0:Pi0.Config``; ``execute`` (C) and ``action_dim`` (A) are the slice that is scored. Noise is
    drawn for the whole chunk, but what lies beyond the slice is not scored (as in pi_RL).
    """

    rule: str
    steps: int
    noise_level: float | None
    every_step: bool
    last_step: bool
    granularity: str
    step_reduction: str
    execute: int
    action_dim: int

    def times(self, step_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where the denoising steps ``step_B`` start and end, [B] each: from one grid, for acting and for scoring again."""
        grid = flow.time_grid(self.steps, step_B.device, dtype)
        return grid[step_B], grid[step_B + 1]

    def choose(self, draws: Draws) -> Tensor:
        """Which denoising steps are stochastic and trained: int64 [B, J]; J = 1, drawn for each sample, or all."""
        candidates = self.steps - (0 if self.last_step else 1)
        if self.every_step:
            return torch.arange(candidates, device=draws.keys_B.device).expand(len(draws), -1)
        return draws.integers(candidates, 1)

    def follow(self, x: Tensor, velocity: Tensor, step_B: Tensor) -> Tensor:
        """The deterministic step: [B, H, D]."""
        return flow.transition(x, velocity, *self.times(step_B, x.dtype), rule="ode").mean

    def transition(self, x: Tensor, velocity: Tensor, step_B: Tensor, learned_std: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and std [B, H, D] of the stochastic step; ``learned_std`` for flow_noise alone."""
        t, t_next = self.times(step_B, x.dtype)
        out = flow.transition(
            x,
            velocity,
            t,
            t_next,
            rule=self.rule,
            noise_level=self.noise_level,
            t_star=flow.guarded_time(t, t_next),
            std=learned_std,
        )
        return out.mean, out.std.expand_as(x)

    def score(self, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log density of the executed slice: [B, C, A]."""
        c, a = self.execute, self.action_dim
        return flow.gaussian_log_prob(x_next[:, :c, :a], mean[:, :c, :a], std[:, :c, :a])

    def units(self, log_density_BJCA: Tensor, prior_BHD: Tensor) -> Tensor:
        """Log-probabilities [B, K'] of the units: 1 (chunk), C (action) or J (step) of them."""
        if self.granularity == "step":
            return log_density_BJCA.sum((2, 3))
        total, count = self._actions(log_density_BJCA).sum(1), log_density_BJCA.shape[1]
        if self.step_reduction == "sum" or count == 0:
            return total
        if self.step_reduction == "mean":
            return total / count
        zero = torch.zeros_like(prior_BHD)
        prior = self._actions(self.score(prior_BHD, zero, torch.ones_like(zero)))
        return (total + prior) / (count + 1)

    def _actions(self, log_density: Tensor) -> Tensor:
        """Summed over the dimensions of an action, and over the actions unless each is a unit: [..., C, A] -> [..., 1 or C]."""
        per_action = log_density.sum(-1)
        return per_action if self.granularity == "action" else per_action.sum(-1, keepdim=True)
