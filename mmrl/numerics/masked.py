"""Reductions over the entries where a boolean mask is True.

Masked-out entries may hold anything, NaN included: they reach neither the result nor its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """``x`` where ``mask`` (bool, broadcastable) is True, ``value`` elsewhere."""
    return torch.where(mask, x, torch.full((), value, dtype=x.dtype, device=x.device))


def count(x: Tensor, mask: Tensor) -> Tensor:
    """How many entries of ``x`` the mask keeps, at least 1 (so that an empty mean is 0, not NaN); a scalar of ``x``'s dtype."""
    return mask.expand_as(x).sum().clamp(min=1).to(x.dtype)


def sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of the kept entries; 0 when nothing is kept."""
    return fill(x, mask).sum()


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the kept entries; 0 when nothing is kept."""
    return sum(x, mask) / count(x, mask)


def var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the kept entries (divisor n - 1, as torch's default); 0 when fewer than two are kept."""
    centred = fill(x - mean(x, mask), mask)  # filled before squaring: the square's gradient at NaN would be NaN
    return (centred**2).sum() / (count(x, mask) - 1).clamp(min=1)


def std(x: Tensor, mask: Tensor) -> Tensor:
    """Square root of the unbiased variance; its gradient is infinite where the entries are all equal, so use it detached."""
    return var(x, mask).sqrt()


def min(x: Tensor, mask: Tensor) -> Tensor:
    """Smallest kept entry; +inf when nothing is kept."""
    return fill(x, mask, float("inf")).min()


def max(x: Tensor, mask: Tensor) -> Tensor:
    """Largest kept entry; -inf when nothing is kept."""
    return fill(x, mask, float("-inf")).max()
