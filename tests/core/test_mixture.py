"""Mixtures: shares by weight, nothing lost or repeated, the same after a reload, and a sentence for a wrong block."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from mmrl.component import Component, Problems
from mmrl.data.mixture import Mixture, Part
from mmrl.protocols import DataContext
from mmrl.types import Examples, Observation


class Counting:
    """Examples (label, 0), (label, 1), ..."""

    @dataclass(frozen=True, config=ConfigDict(extra="forbid"))
    class Config:
        label: int

    def __init__(self, config: Config, *, context: DataContext) -> None:
        self.label, self.next, self.horizon = config.label, 0, context.horizon

    def batch(self, size: int) -> Examples:
        count_N = torch.arange(self.next, self.next + size, dtype=torch.float32)
        self.next += size
        state = torch.stack([torch.full_like(count_N, self.label), count_N], 1)
        actions = count_N[:, None, None].expand(-1, self.horizon, 1)
        return Examples(Observation({}, state, ("go",) * size), actions, torch.ones(size, self.horizon, dtype=torch.bool))

    def state_dict(self) -> dict[str, Tensor]:
        return {"next": torch.tensor(self.next)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert set(state) == {"next"}
        self.next = int(state["next"])


DEMONSTRATIONS = {"target": "mmrl.data.demonstrations:ScriptedDemonstrations", "episodes": 2}


def mixture(*weights: float, seed: int = 0) -> Mixture:
    sources = [Component(f"counting {i}", Counting, Counting.Config(label=i)) for i in range(len(weights))]
    config = Mixture.Config(parts=[Part(data, weight) for data, weight in zip(sources, weights, strict=True)])
    context: Any = DataContext(lambda n, o: None, 2, seed, torch.device("cpu"))  # type: ignore[arg-type,return-value]
    return Mixture(config, context=context)


def seen(examples: Examples) -> list[tuple[int, int]]:
    assert examples.observation.state is not None
    return [(int(label), int(count)) for label, count in examples.observation.state]


def test_shares_follow_the_weights_and_each_part_goes_on_where_it_was() -> None:
    source = mixture(0.5, 1.5, 2.0)
    drawn = [item for _ in range(40) for item in seen(source.batch(100))]
    counts = Counter(label for label, _ in drawn)
    for label, share in enumerate((0.125, 0.375, 0.5)):
        assert counts[label] == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)
        assert [count for other, count in drawn if other == label] == list(range(counts[label]))


def test_a_batch_has_its_size_even_if_a_part_gets_nothing() -> None:
    source = mixture(1e-9, 1.0)
    assert seen(source.batch(5)) == [(1, i) for i in range(5)]


def test_a_reloaded_mixture_goes_on_as_if_nothing_had_happened() -> None:
    source, twin = mixture(1.0, 2.0), mixture(1.0, 2.0)
    source.batch(17)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    assert set(state) == {"generator", "0.next", "1.next"}
    sizes = (3, 20, 64, 64, 64)
    expected = [seen(source.batch(size)) for size in sizes]
    twin.batch(5)
    twin.load_state_dict(state)
    assert [seen(twin.batch(size)) for size in sizes] == expected


def test_another_seed_mixes_otherwise() -> None:
    assert seen(mixture(1.0, 1.0).batch(64)) == seen(mixture(1.0, 1.0).batch(64))
    counts = {sum(label for label, _ in seen(mixture(1.0, 1.0, seed=seed).batch(64))) for seed in range(8)}
    assert len(counts) > 1


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "parts"),
        ([{"weight": 0, "data": DEMONSTRATIONS}], "weight"),
        ([{"data": {**DEMONSTRATIONS, "lable": 2}}], "lable"),
        ([{"weight": 1.0}], "data"),
    ],
)
def test_a_wrong_mixture_is_refused_by_key(parts: list[Any], sentence: str) -> None:
    with pytest.raises(Problems) as caught:
        Component.parse({"target": "mmrl.data.mixture:Mixture", "parts": parts})
    assert sentence in str(caught.value)
