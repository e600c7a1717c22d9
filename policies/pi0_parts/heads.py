"""The two heads reinforcement learning adds to a pi0: a critic, and the learned exploration noise of Flow-Noise.

Both compute in the precision of their own weights, float32 or better, also within autocast: a value in bfloat16 has two or three
digits, and a standard deviation goes into every log-probability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths with an activation between them (none after the last)."""
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(width_in, width_out))
        if i < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def _last(net: nn.Sequential) -> nn.Linear:
    last = net[-1]
    assert isinstance(last, nn.Linear)
    return last


TIME_FEATURES = 8


def time_features(elapsed_B: Tensor) -> Tensor:
    """Sine and cosine of the number of decisions at periods from 6 to 400 decisions: float32 [B, 8]."""
    angle_B4 = elapsed_B[:, None] * torch.tensor([1.0, 1 / 4, 1 / 16, 1 / 64], device=elapsed_B.device)
    return torch.cat([angle_B4.sin(), angle_B4.cos()], 1)


class CriticHead(nn.Module):
    """Layer-normalised features [B, F] -> value [B]. The last layer starts at zero, so the first value estimate is 0."""

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.net = mlp((features, *hidden, 1), nn.GELU)
        nn.init.zeros_(_last(self.net).weight)
        nn.init.zeros_(_last(self.net).bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        with torch.autocast(features_BF.device.type, enabled=False):
            return self.net(self.norm(features_BF.to(self.norm.weight.dtype))).squeeze(-1)


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
        with torch.autocast(hidden_BHW.device.type, enabled=False):
            squashed = (torch.tanh(self.net(hidden_BHW.to(_last(self.net).weight.dtype))) + 1) / 2
            return torch.exp(0.5 * (self.log_var_low + (self.log_var_high - self.log_var_low) * squashed))
