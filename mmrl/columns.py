"""Columns of a batch that are no tensors: objects, kept once, under the leading axes of a tensor.

What a policy needs to score a decision again may be of any size (a prompt's tokens, a picture's patches) and the same in many
rows (the prompt of a group). A ``Column`` says which object stands in which row, and takes the same indexing as a tensor does;
``stack``, ``cat`` and ``put`` take either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """Objects under the leading axes of ``index``: int64, where i stands for ``items[i - 1]`` and 0 for nothing at all.

    >>> column = Column.of(["a", None, "b", "a"])
    >>> column[torch.tensor([3, 0, 1])].tolist(), len(column.items)
    (['a', 'a', None], 2)
    """

    index: Tensor
    items: tuple[Any, ...]

    @staticmethod
    def of(objects: Iterable[Any], device: torch.device | None = None) -> Column:
        """One axis; an object that occurs again (the same one, not an equal one) is kept once. None is nothing."""
        places: dict[int, int] = {}
        items: list[Any] = []
        index = []
        for thing in objects:
            if thing is not None and id(thing) not in places:
                items.append(thing)
                places[id(thing)] = len(items)
            index.append(0 if thing is None else places[id(thing)])
        return Column(torch.tensor(index, dtype=torch.long, device=device), tuple(items))

    @property
    def shape(self) -> torch.Size:
        return self.index.shape

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, where: Any) -> Column:
        return Column(self.index[where], self.items)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Column:
        return Column(fn(self.index), self.items)

    def tolist(self) -> list[Any]:
        """The objects, None where there is nothing, in lists as deep as there are axes."""

        def look(index: Any) -> Any:
            return [look(i) for i in index] if isinstance(index, list) else self.items[index - 1] if index else None

        return look(self.index.tolist())


Values = TypeVar("Values", bound=Tensor | Column)


def stack(values: Sequence[Values]) -> Values:
    """Along a new first axis."""
    return _join(values, torch.stack)


def cat(values: Sequence[Values], dim: int = 0) -> Values:
    return _join(values, lambda tensors: torch.cat(tensors, dim))


def put(rows: Values, index_N: Tensor, size: int) -> Values:
    """The N rows as the rows ``index_N`` of ``size``; zeros, or nothing, elsewhere."""

    def spread(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(size, *tensor.shape[1:]).index_copy_(0, index_N, tensor)

    return apply(rows, spread)


def apply(values: Values, fn: Callable[[Tensor], Tensor]) -> Values:
    """``fn`` of a tensor, or of a column's index. Zeros must stay zeros: they are a column's nothing."""
    applied: Any = values.map(fn) if isinstance(values, Column) else fn(values)
    return applied


def _join(values: Sequence[Values], how: Callable[[list[Tensor]], Tensor]) -> Values:
    """Columns are joined with every object kept once."""
    columns: list[Any] = list(values)
    joined: Any = _join_columns(columns, how) if isinstance(columns[0], Column) else how(columns)
    return joined


def _join_columns(columns: Sequence[Column], how: Callable[[list[Tensor]], Tensor]) -> Column:
    items = Column.of(item for column in columns for item in column.items).items
    places = {id(item): place for place, item in enumerate(items, 1)}

    def renumbered(column: Column) -> Tensor:
        return torch.tensor([0, *(places[id(item)] for item in column.items)], device=column.index.device)[column.index]

    return Column(how([renumbered(column) for column in columns]), items)
