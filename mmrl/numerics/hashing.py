"""Hashes of integers: random bits that depend on what is asked for, not on what was asked for before.

Integer arithmetic only, so the bits are the same on every device and at any tensor size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood 2014), on int64 of any shape."""
    x = x + GOLDEN
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


@functools.lru_cache(maxsize=1024)
def salt(*words: int) -> int:
    """One 64-bit key out of several integers; the order counts."""
    key = torch.zeros((), dtype=torch.int64)
    for word in words:
        key = mix(key ^ word)
    return int(key)
