"""Random numbers that belong to the rows of a batch, not to the batch.

A row's numbers are a function of its key and of how many it has drawn, so they do not change with the rows beside it: what a
policy does in an episode depends neither on how many environments run in lock-step, nor on which of them are acted for
together, nor on the order of the slots.

The generator is splitmix64 (Steele, Lea and Flood 2014) with a key for each row; normal numbers are Box and Muller's (1958).
They are computed in float64 and then rounded, because log and cos may differ in the last bit between the vectorised body and the
scalar tail of a kernel, and a row must not depend on its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmrl.numerics.hashing import GOLDEN, mix, salt, shift

_BITS = {torch.float32: 24, torch.float64: 53}  # what the type's integers hold exactly


class Draws:
    """A stream of random numbers for each of B rows; ``keys_B`` is int64 [B]. All rows draw equally often.

    >>> draws = Draws.of(0, torch.tensor([7, 8, 9]))
    >>> alone = Draws.of(0, torch.tensor([8]))
    >>> torch.equal(draws.normal(2, 3)[1:2], alone.normal(2, 3))
    True
    """

    def __init__(self, keys_B: Tensor) -> None:
        self.keys_B, self._drawn = keys_B, 0

    @staticmethod
    def of(seed: int, ids_B: Tensor, *more_B: Tensor | int) -> Draws:
        """The streams of ``seed`` that are named by one or several int64 numbers a row; their order counts."""
        keys_B = mix(ids_B ^ salt(seed))
        for more in more_B:
            keys_B = mix(keys_B ^ more)
        return Draws(keys_B)

    def __len__(self) -> int:
        return len(self.keys_B)

    def select(self, index_N: Tensor) -> Draws:
        """The rows ``index_N`` (int64 [N], or a mask), which go on where they stand."""
        chosen = Draws(self.keys_B[index_N])
        chosen._drawn = self._drawn
        return chosen

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1), float32 or float64: [B, *shape]."""
        return self._uniform(math.prod(shape), dtype).reshape(len(self), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of mean 0 and variance 1, float32 or float64: [B, *shape]."""
        count = math.prod(shape)
        u_BP2 = self._uniform(2 * -(-count // 2), torch.float64).unflatten(1, (-1, 2))
        radius_BP = (-2 * (1 - u_BP2[..., 0]).log()).sqrt()  # 1 - u is above 0
        angle_BP = 2 * math.pi * u_BP2[..., 1]
        pairs_BP2 = torch.stack([radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()], -1)
        return pairs_BP2.flatten(1)[:, :count].reshape(len(self), *shape).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to ``high`` - 1, equally likely (to within high / 2^53): int64 [B, *shape]."""
        return (self.uniform(*shape, dtype=torch.float64) * high).long()

    def categorical(self, logits_BV: Tensor) -> Tensor:
        """One of V choices with probability softmax(logits), for each of the leading indices: int64 [B, ...]."""
        cumulative = logits_BV.double().softmax(-1).cumsum(-1)
        total = cumulative[..., -1:]
        u = self.uniform(*logits_BV.shape[1:-1], dtype=torch.float64).unsqueeze(-1) * total
        # Rounding must not lift u to the total, which no choice lies above.
        return (cumulative <= u.minimum(total.nextafter(torch.zeros_like(total)))).sum(-1)

    def _uniform(self, count: int, dtype: torch.dtype) -> Tensor:
        """[B, count] in [0, 1)."""
        index = torch.arange(self._drawn, self._drawn + count, device=self.keys_B.device)
        self._drawn += count
        bits = _BITS[dtype]
        return shift(mix(self.keys_B[:, None] + index * GOLDEN), 64 - bits).to(dtype) * 2.0**-bits


def random_keys(rows: int, generator: torch.Generator) -> Tensor:
    """A key for each of so many rows: int64 [rows], on the generator's device."""
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator, device=generator.device)
