"""Random numbers without a generator: every draw is a hash of (key, task id, index).

So an episode does not depend on how many environments run beside it, nor on the order in which they are reset. Integer
arithmetic and exact float operations only, so the numbers are the same bit for bit at any tensor size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.numerics.hashing import mix, shift

_BITS = 24  # a float32 holds integers of 24 bits exactly


def _bits(key: int, ids_B: Tensor, first_B: Tensor | int, count: int) -> Tensor:
    """24 random bits for each of ``count`` draws per id, from draw ``first_B`` on: int64 [count, B]."""
    index_N1 = torch.arange(count, device=ids_B.device)[:, None]
    return shift(mix(mix(ids_B ^ key) + (index_N1 + first_B)), 64 - _BITS)


def uniform(key: int, ids_B: Tensor, count: int) -> Tensor:
    """``count`` numbers in [0, 1) per id: float32 [B, count]."""
    return (_bits(key, ids_B, 0, count).float() * 2.0**-_BITS).t()


def normal(key: int, ids_B: Tensor, step_B: Tensor, count: int) -> Tensor:
    """``count`` nearly Gaussian numbers per (id, step), mean 0 and variance 1: float32 [B, count].

    The sum of four uniform numbers (Irwin-Hall), summed as integers: log and cos of Box-Muller may differ in the last bit
    between the vectorised body and the scalar tail of a kernel, and then an episode would depend on its slot.
    """
    bits_NB = _bits(key, ids_B, step_B * (4 * count), 4 * count)
    total = bits_NB.unflatten(0, (count, 4)).sum(1) - (1 << (_BITS + 1))
    return (total.float() * (3.0**0.5 * 2.0**-_BITS)).t()
