"""The learned exploration noise of Flow-Noise.

It computes in the precision of its own weights, float32 or better, also within autocast: it goes into every log-probability.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from policies.shared.heads import last_layer, mlp


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
            squashed = (torch.tanh(self.net(hidden_BHW.to(last_layer(self.net).weight.dtype))) + 1) / 2
            return torch.exp(0.5 * (self.log_var_low + (self.log_var_high - self.log_var_low) * squashed))
