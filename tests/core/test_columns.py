from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmrl.columns import Column, cat, put, stack

OBJECTS = [object() for _ in range(4)]
LISTS = st.lists(st.sampled_from([None, *OBJECTS]), min_size=1, max_size=6)


def pairs(lists: list[list[Any]]) -> list[tuple[Column, torch.Tensor]]:
    """Columns, and the tensors that mean the same: each object as its number, None as 0."""
    numbers = {id(thing): number for number, thing in enumerate(OBJECTS, 1)}
    return [(Column.of(things), torch.tensor([numbers.get(id(thing), 0) for thing in things])) for things in lists]


def same(column: Column, tensor: torch.Tensor) -> bool:
    def look(numbers: Any) -> Any:
        return [look(n) for n in numbers] if isinstance(numbers, list) else OBJECTS[numbers - 1] if numbers else None

    return column.tolist() == look(tensor.tolist()) and column.shape == tensor.shape


@given(st.lists(LISTS, min_size=1, max_size=4))
def test_columns_join_as_tensors_do(lists: list[list[Any]]) -> None:
    both = pairs(lists)
    joined = cat([column for column, _ in both])
    assert same(joined, torch.cat([tensor for _, tensor in both]))
    assert len(joined.items) == len({id(thing) for things in lists for thing in things if thing is not None})
    shortest = min(map(len, lists))
    cut = [(column[:shortest], tensor[:shortest]) for column, tensor in both]
    stacked, expected = stack([column for column, _ in cut]), torch.stack([tensor for _, tensor in cut])
    assert same(stacked, expected)
    assert same(cat([stacked, stacked], 1), torch.cat([expected, expected], 1))
    assert same(stacked[:, 0], expected[:, 0])


@given(LISTS, st.randoms())
def test_rows_are_spread_as_a_tensors_are(things: list[Any], random: Any) -> None:
    ((column, tensor),) = pairs([things])
    index = torch.tensor(random.sample(range(9), len(things)))
    assert same(put(column, index, 9), put(tensor, index, 9))
    assert put(tensor, index, 9)[index].tolist() == tensor.tolist()


def test_an_equal_object_is_another_one() -> None:
    one, other = [1], [1]
    assert len(Column.of([one, other, one]).items) == 2


def test_the_empty_column() -> None:
    assert Column.of([]).tolist() == [] and len(Column.of([None, None]).items) == 0
    assert cat([Column.of([]), Column.of([None])]).tolist() == [None]


@pytest.mark.parametrize("where", [torch.tensor([True, False, True]), slice(1, None), torch.tensor([2, 0])])
def test_indexing_is_a_tensors(where: Any) -> None:
    ((column, tensor),) = pairs([[OBJECTS[2], None, OBJECTS[0]]])
    assert same(column[where], tensor[where])
