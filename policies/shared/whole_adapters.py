"""A low-rank adapter that costs no pass of its own: y = x (W + s B A)^T + b, one product in place of three.

peft's layer goes x W^T + s (x A^T) B^T. The two differ by rounding alone where weights are held in float32 or better; in bfloat16
W + s B A would swallow a small s B A, so there, and under autocast, the layer stays peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class WholeLinear(lora.Linear):
    """See the module. Of one adapter without dropout, over a layer that is frozen: as ``policies.shared.adapters`` makes them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        name, *others = self.active_adapters
        if args or kwargs or others or self.disable_adapters or self.merged or _rounds(x, base.weight):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _Whole.apply(x, base.weight, base.bias, a, b, self.scaling[name])


def _rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether the sum W + s B A would lose what is added."""
    return torch.is_autocast_enabled(x.device.type) or torch.finfo(weight.dtype).bits < 32


class _Whole(torch.autograd.Function):
    """x [..., in], W [out, in], A [rank, in], B [out, rank]. W + s B A is made anew to go back, so that no copy of W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return nn.functional.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        """Through the product with A and B, or where the rank is high through dW, whichever has fewer multiplications."""
        (x, weight, a, b), scale = ctx.saved_tensors, ctx.scale
        grad_x = grad @ torch.addmm(weight, b, a, alpha=scale) if ctx.needs_input_grad[0] else None
        grad_T, x_T = grad.flatten(0, -2), x.flatten(0, -2)
        if 2 * len(a) * sum(weight.shape) < weight.numel():
            return grad_x, None, None, scale * ((grad_T @ b).T @ x_T), scale * (grad_T.T @ (x_T @ a.T)), None
        grad_weight = grad_T.T @ x_T
        return grad_x, None, None, scale * (b.T @ grad_weight), scale * (grad_weight @ a.T), None
