"""Arithmetic shared by the laws, the judge and the expert. Tensors have the batch axis last, so that kernels run along it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def squared(vectors: Tensor) -> Tensor:
    """Squared Euclidean length along the first axis, as separately rounded operations."""
    total, *others = (vectors * vectors).unbind(0)
    for square in others:
        total = total + square
    return total


def length(vectors: Tensor) -> Tensor:
    """The root of ``squared``."""
    return squared(vectors).sqrt()


def batch_last(rows: Tensor) -> Tensor:
    """A copy with the first axis moved to the end, in memory too."""
    return rows.movedim(0, -1).contiguous()


@functools.cache
def constant(values: Sequence[Any], device: torch.device) -> Tensor:
    """These numbers as a tensor, made once: in a step of less than a millisecond even small copies count."""
    return torch.tensor(values, device=device)
