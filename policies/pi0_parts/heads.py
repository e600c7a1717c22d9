"""The two heads reinforcement learning adds to a pi0: a critic, and the learned exploration noise of Flow-Noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths with an activation between them (none after the last)."""
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(nn.Linear(width_in, width_out))
        if i < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


class CriticHead(nn.Module):
    """Layer-normalised features [B, F] -> value [B]. The last layer starts at zero, so the first value estimate is 0."""

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.net = mlp((features, *hidden, 1), nn.GELU)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        return self.net(self.norm(features_BF.float())).squeeze(-1)


class NoiseHead(nn.Module):
    """Flow-Noise's standard deviation per (horizon position, action dimension), from the expert's output there.

    pi_RL (RLinf ``ExploreNoiseNet``): MLP width -> 128 -> 64 -> D with tanh, then log-variance squashed into bounds:
    log var = low + (high - low)(tanh(z) + 1)/2, std = exp(log var / 2). ``std_range`` are standard deviations.
    """

    def __init__(self, width: int, action_dim: int, std_range: tuple[float, float]) -> None:
        super().__init__()
        self.net = mlp((width, 128, 64, action_dim), nn.Tanh)
        self.log_var_low, self.log_var_high = (2 * math.log(std) for std in std_range)

    def forward(self, hidden_BHW: Tensor) -> Tensor:
        squashed = (torch.tanh(self.net(hidden_BHW.float())) + 1) / 2
        return torch.exp(0.5 * (self.log_var_low + (self.log_var_high - self.log_var_low) * squashed))
