"""Log-probabilities and entropies of tokens from logits, without a float32 copy of the logits.

A vocabulary of 150,000 makes [B, T, V] the largest tensor of a training step. Both functions go over T in chunks, in float32 (or
float64 if the logits are), forward and backward; what they keep for the backward pass is the logits as given and [B, T] numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_log_probs(logits_BTV: Tensor, ids_BT: Tensor, chunk: int = 128) -> Tensor:
    """log softmax(logits)[id] for each position: float32 [B, T]. ids int64, ``chunk`` positions of T at a time.

    The logits at a position score the id at the same position; shifting is the caller's.
    """
    return _LogProbs.apply(logits_BTV, ids_BT, chunk)  # pyright: ignore[reportReturnType]


def token_entropy(logits_BTV: Tensor, chunk: int = 128) -> Tensor:
    """Entropy (nats) of softmax(logits) at each position: float32 [B, T]. Logits of -inf count as probability 0."""
    return _Entropy.apply(logits_BTV, chunk)  # pyright: ignore[reportReturnType]


def _pieces(length: int, chunk: int) -> Iterator[slice]:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; use at least 1 position")
    return (slice(start, start + chunk) for start in range(0, length, chunk))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, ids_BT: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(logits_BTV, ids_BT)
        ctx.chunk = chunk
        parts = []
        for piece in _pieces(logits_BTV.shape[1], chunk):
            wide = _wide(logits_BTV[:, piece])
            parts.append(wide.gather(-1, ids_BT[:, piece, None]).squeeze(-1) - wide.logsumexp(-1))
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """d log p(id) / d logit_v = [v is id] - p(v)."""
        logits_BTV, ids_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for piece in _pieces(logits_BTV.shape[1], ctx.chunk):
            grad = _wide(logits_BTV[:, piece]).softmax(-1).neg_()
            grad.scatter_add_(-1, ids_BT[:, piece, None], torch.ones_like(grad[..., :1]))
            grad_BTV[:, piece] = grad.mul_(grad_BT[:, piece, None])
        return grad_BTV, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, chunk: int) -> Tensor:
        parts = [
            torch.special.entr(_wide(logits_BTV[:, piece]).softmax(-1)).sum(-1) for piece in _pieces(logits_BTV.shape[1], chunk)
        ]
        entropy_BT = torch.cat(parts, dim=1)
        ctx.save_for_backward(logits_BTV, entropy_BT)
        ctx.chunk = chunk
        return entropy_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """d H / d logit_v = -p(v) (log p(v) + H)."""
        logits_BTV, entropy_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for piece in _pieces(logits_BTV.shape[1], ctx.chunk):
            p = _wide(logits_BTV[:, piece]).softmax(-1)
            grad = torch.special.entr(p) - p * entropy_BT[:, piece, None]
            grad_BTV[:, piece] = grad * grad_BT[:, piece, None]
        return grad_BTV, None
