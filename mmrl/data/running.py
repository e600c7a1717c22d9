"""Statistics of vectors that are too many to hold: a few passes over them, a fixed amount of memory.

Moments are merged batch by batch in float64 (Chan, Golub and LeVeque 1979). Quantiles are exact order statistics: a float32 has
32 bits, which sort like the number itself once they are flipped as below; the first pass counts the upper 16 bits of each
dimension, the second the lower 16 bits within the few cells that hold a wanted rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CELLS = 1 << 16


class Moments:
    """Count, mean, variance, least and greatest of each dimension of float vectors [N, D]."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64)
        self._squares_D = torch.zeros(dim, dtype=torch.float64)  # sum of squared distances from the mean
        self.min_D = torch.full((dim,), math.inf, dtype=torch.float64)
        self.max_D = -self.min_D

    def update(self, x_ND: Tensor) -> None:
        if len(x_ND) == 0:
            return
        x_ND = x_ND.double()
        added, total = len(x_ND), self.count + len(x_ND)
        mean_D = x_ND.mean(0)
        delta_D = mean_D - self.mean_D
        self._squares_D += (x_ND - mean_D).square().sum(0) + delta_D.square() * (self.count * added / total)
        self.mean_D += delta_D * (added / total)
        self.min_D, self.max_D = self.min_D.minimum(x_ND.amin(0)), self.max_D.maximum(x_ND.amax(0))
        self.count = total

    def std_D(self, *, unbiased: bool) -> Tensor:
        """Of one vector alone the unbiased one is not known, and given as 0."""
        return (self._squares_D / max(1, self.count - unbiased)).sqrt()


class Quantiles:
    """Quantiles of each dimension of float32 vectors [N, D], interpolated between order statistics as numpy's default does.

    Call ``first`` with every batch, then ``second`` with every batch again, in any order; then ``result``.
    """

    def __init__(self, dim: int, levels: Sequence[float]) -> None:
        self._levels = tuple(levels)
        self._upper = torch.zeros(dim, CELLS, dtype=torch.long)
        self._lower: dict[tuple[int, int], Tensor] = {}  # (dimension, cell of the upper bits) -> counts of the lower bits
        self._below: dict[tuple[int, int], int] = {}

    def first(self, x_ND: Tensor) -> None:
        for counts, column_N in zip(self._upper, _sortable(x_ND).unbind(1), strict=True):
            counts += torch.bincount(column_N >> 16, minlength=CELLS)

    def second(self, x_ND: Tensor) -> None:
        if not self._lower:
            self._choose_cells()
        columns = _sortable(x_ND).unbind(1)
        for (dimension, cell), counts in self._lower.items():
            inside = columns[dimension][columns[dimension] >> 16 == cell]
            counts += torch.bincount(inside & (CELLS - 1), minlength=CELLS)

    def result(self) -> Tensor:
        """float64 [Q, D], a row per level."""
        return torch.tensor(
            [[self._quantile(dimension, level) for dimension in range(len(self._upper))] for level in self._levels],
            dtype=torch.float64,
        )

    def _ranks(self, level: float, count: int) -> tuple[int, int, float]:
        """The two order statistics (from 0) between which the quantile lies, and how far from the lower one."""
        place = level * (count - 1)
        below = min(int(place), count - 1)
        return below, min(below + 1, count - 1), place - below

    def _choose_cells(self) -> None:
        for dimension, counts in enumerate(self._upper):
            ends = counts.cumsum(0)
            for level in self._levels:
                for rank in self._ranks(level, int(ends[-1]))[:2]:
                    cell = int(torch.searchsorted(ends, rank, right=True))
                    self._lower.setdefault((dimension, cell), torch.zeros(CELLS, dtype=torch.long))
                    self._below[dimension, cell] = int(ends[cell - 1]) if cell else 0

    def _quantile(self, dimension: int, level: float) -> float:
        lower, upper, share = self._ranks(level, int(self._upper[dimension].sum()))
        low, high = self._value(dimension, lower), self._value(dimension, upper)
        return low + share * (high - low)

    def _value(self, dimension: int, rank: int) -> float:
        """The number that stands at ``rank`` among all of its dimension."""
        cell = int(torch.searchsorted(self._upper[dimension].cumsum(0), rank, right=True))
        within = self._lower[dimension, cell].cumsum(0)
        rest = int(torch.searchsorted(within, rank - self._below[dimension, cell], right=True))
        return _number((cell << 16) | rest)


def _sortable(x_ND: Tensor) -> Tensor:
    """int64 in [0, 2**32) that sort like the float32 they come from: all bits flipped if negative, else the sign bit alone."""
    bits = x_ND.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def _number(code: int) -> float:
    bits = code - (1 << 31) if code >= 1 << 31 else 0xFFFFFFFF - code
    return float(torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32))
