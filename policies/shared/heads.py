"""The critic that reinforcement learning adds to a model, and the layers that heads are made of.

Heads compute in the precision of their own weights, float32 or better, also within autocast: a value in bfloat16 has two or three
digits.
"""

from __future__ import annotations

import itertools
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


def last_layer(net: nn.Sequential) -> nn.Linear:
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
        nn.init.zeros_(last_layer(self.net).weight)
        nn.init.zeros_(last_layer(self.net).bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        with torch.autocast(features_BF.device.type, enabled=False):
            return self.net(self.norm(features_BF.to(self.norm.weight.dtype))).squeeze(-1)
