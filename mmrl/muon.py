"""Muon beside AdamW in one optimizer: orthogonalised momentum for matrices (Jordan et al. 2024, "Muon: an optimizer for hidden
layers in neural networks").

    M_t = beta M_{t-1} + (1 - beta) G_t        U_t = (1 - beta) G_t + beta M_t  (Nesterov)
    W_t = (1 - lr w) W_{t-1} - lr sqrt(max(1, rows / columns)) NS_5(U_t)

NS_5 is five Newton-Schulz iterations towards U V^T of U S V^T. The update is that of ``torch.optim.Muon`` (``adjust_lr_fn``
"original"), which a test compares it with. The difference is the precision: torch's iterates in bfloat16, for which most CPUs
have no instructions (for the 48 matrices of the tiny pi0 0.73 s an update on one core; in float32 it is 0.04 s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, singular values end between about 0.7 and 1.2
_ITERATIONS = 5
_TINY = 1e-7


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with ``muon: True``: all their parameters must be matrices."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients; there is no closure."""
        assert closure is None
        mine = [(group, p, p.grad) for group in self.param_groups if group["muon"] for p in group["params"] if p.grad is not None]
        for _, parameter, _ in mine:
            parameter.grad = None  # so that AdamW leaves it alone
        super().step()
        for group, parameter, gradient in mine:
            parameter.grad = gradient
            self._update(group, parameter, gradient)

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # torch's AdamW looks for one in every state that it loads
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalize(gradient.lerp(momentum, MOMENTUM))
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalize(matrix_MN: Tensor) -> Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, in float32 or better: [M, N]."""
    x = matrix_MN.to(torch.promote_types(matrix_MN.dtype, torch.float32))
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=_TINY)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
