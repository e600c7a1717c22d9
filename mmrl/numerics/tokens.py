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


def head_log_probs(
    hidden_MW: Tensor,
    weight_VW: Tensor,
    ids_M: Tensor,
    *,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight^T / temperature)[id] and the entropy of that distribution (nats): float32 [M] each.

    The logits are never whole: they are computed ``chunk`` rows at a time, forward and again backward, in float32 (or float64 if
    the weights are); what is kept is [M] numbers. forbidden: int64, tokens of probability 0; an id must not be one of them.
    """
    return _HeadLogProbs.apply(hidden_MW, weight_VW, ids_M, temperature, forbidden, chunk)  # pyright: ignore


def head_logits(hidden: Tensor, weight_VW: Tensor, *, temperature: float, forbidden: Tensor | None) -> Tensor:
    """Logits of the distribution that ``head_log_probs`` scores, in float32 or better: [..., V]."""
    logits = _wide(hidden @ weight_VW.T) / temperature
    return logits if forbidden is None else logits.index_fill(-1, forbidden, -torch.inf)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MW: Tensor,
        weight_VW: Tensor,
        ids_M: Tensor,
        temperature: float,
        forbidden: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies = [], []
        for piece in _pieces(len(ids_M), chunk):
            log_p = head_logits(hidden_MW[piece], weight_VW, temperature=temperature, forbidden=forbidden).log_softmax(-1)
            log_probs.append(log_p.gather(-1, ids_M[piece, None]).squeeze(-1))
            entropies.append(torch.special.entr(log_p.exp()).sum(-1))
        empty = hidden_MW.new_zeros(0, dtype=torch.promote_types(hidden_MW.dtype, torch.float32))
        log_probs_M, entropy_M = torch.cat([empty, *log_probs]), torch.cat([empty, *entropies])
        ctx.save_for_backward(hidden_MW, weight_VW, ids_M, entropy_M, forbidden)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_probs_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, grad_entropy_M: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """d log p(id) / d logit_v = [v is id] - p(v); d H / d logit_v = -p(v) (log p(v) + H)."""
        hidden_MW, weight_VW, ids_M, entropy_M, forbidden = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_MW)
        wide = torch.promote_types(weight_VW.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight_VW, dtype=wide) if ctx.needs_input_grad[1] else None
        for piece in _pieces(len(ids_M), ctx.chunk):
            logits = head_logits(hidden_MW[piece], weight_VW, temperature=ctx.temperature, forbidden=forbidden)
            p = logits.softmax(-1)
            of_entropy = torch.special.entr(p) - p * entropy_M[piece, None]
            one_hot = torch.zeros_like(p).scatter_(-1, ids_M[piece, None], 1.0)
            grad = ((one_hot - p) * grad_M[piece, None] + of_entropy * grad_entropy_M[piece, None]) / ctx.temperature
            narrow = grad.to(hidden_MW.dtype)
            grad_hidden[piece] = narrow @ weight_VW
            if grad_weight is not None:
                grad_weight += narrow.T @ hidden_MW[piece]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VW.dtype), None, None, None, None
