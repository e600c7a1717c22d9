"""A policy without a network: its scores are leaves, so that the gradient of a loss can be read off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mmrl.types import Batch, Evaluation


class Leaves:
    """Scores row ``trace["row"]`` by looking it up."""

    def __init__(self, log_probs_NK: Tensor, entropy_NK: Tensor, values_NV: Tensor) -> None:
        self.log_probs_NK, self.entropy_NK, self.values_NV = (
            x.clone().requires_grad_() for x in (log_probs_NK, entropy_NK, values_NV)
        )

    def evaluate(self, trace: Mapping[str, Tensor]) -> Evaluation:
        row = trace["row"]
        return Evaluation(self.log_probs_NK[row], self.entropy_NK[row], self.values_NV[row])

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of log-probabilities, entropies and values; zeros where no gradient arrived."""
        leaves = (self.log_probs_NK, self.entropy_NK, self.values_NV)
        first, second, third = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
        return first, second, third


Case = tuple[Leaves, Batch]


@pytest.fixture
def case() -> Callable[..., Case]:
    """``case(n, k, j)``: a policy and a batch of n samples of j decisions with k units in all, so far from the rollout's policy
    that ratios are clipped. v: values of a sample, j or k."""

    def make(
        n: int = 7,
        k: int = 3,
        j: int = 1,
        v: int | None = None,
        *,
        spread: float = 0.3,
        reference: bool = True,
        masked: bool = True,
    ) -> Case:
        v = v or j
        old_NK = torch.randn(n, k, dtype=torch.float64)
        new_NK = old_NK + spread * torch.randn(n, k, dtype=torch.float64)
        mask_NK = torch.rand(n, k) < 0.7 if masked else torch.ones(n, k, dtype=torch.bool)
        mask_NK[0] = not masked  # a decision without a trained unit
        old_values_NV, returns_NV = torch.randn(n, v, dtype=torch.float64), 2 * torch.randn(n, v, dtype=torch.float64)
        values_NV = old_values_NV + 0.4 * torch.randn(n, v, dtype=torch.float64)
        batch = Batch(
            trace={"row": torch.arange(n)},
            old_log_probs_NK=old_NK,
            mask_NK=mask_NK,
            advantages_NJ=torch.randn(n, j, dtype=torch.float64),
            returns_NV=returns_NV,
            old_values_NV=old_values_NV,
            reference_log_probs_NK=old_NK + 0.2 * torch.randn(n, k, dtype=torch.float64) if reference else None,
        )
        return Leaves(new_NK, torch.rand(n, k, dtype=torch.float64), values_NV), batch

    return make
