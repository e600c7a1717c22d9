"""Draws: distributions against their theory, and rows that depend on nothing but their keys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmrl.numerics.draws import Draws


def make(rows: int, seed: int = 0) -> Draws:
    return Draws.of(seed, torch.arange(rows))


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) times the largest gap between the empirical and the given distribution function (``cdf`` at the sorted sample)."""
    n = len(sample)
    step = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((step[1:] - cdf).max(), (cdf - step[:-1]).max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "count"), [(40_000, 1), (200, 200), (1, 40_000)])
def test_uniform_numbers_are_uniform(dtype: torch.dtype, rows: int, count: int) -> None:
    """Across rows, along a row, and both; 1.95 is exceeded by chance once in a thousand."""
    x = make(rows).uniform(count, dtype=dtype)
    assert x.dtype == dtype and x.shape == (rows, count) and x.min() >= 0 and x.max() < 1
    ordered = x.flatten().double().sort().values
    assert kolmogorov_smirnov(ordered, ordered) < 1.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "count"), [(40_000, 1), (201, 199), (1, 40_001)])
def test_normal_numbers_are_normal(dtype: torch.dtype, rows: int, count: int) -> None:
    x = make(rows, seed=3).normal(count, dtype=dtype)
    assert x.dtype == dtype and x.shape == (rows, count)
    ordered = x.flatten().double().sort().values
    assert kolmogorov_smirnov(ordered, torch.special.ndtr(ordered)) < 1.95
    assert ordered.abs().max() > 3.5  # it has tails


def test_numbers_are_uncorrelated_along_rows_and_between_them() -> None:
    """Neighbours in a row (also the two of a Box-Muller pair), neighbouring keys, neighbouring seeds and later draws."""
    n = 40_000
    draws, others = make(n), make(n, seed=1)
    first, second = draws.normal(2), draws.normal(2)
    pairs = [(first[:, 0], first[:, 1]), (first[:, 1], second[:, 0]), (first[1:, 0], first[:-1, 0])]
    pairs += [(first[:, 0], others.normal(2)[:, 0]), (first[:, 0] ** 2, first[:, 1] ** 2)]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(n)


def test_integers_are_equally_likely() -> None:
    n, high = 60_000, 7
    x = make(n).integers(high, 2)
    assert x.dtype == torch.int64 and x.shape == (n, 2)
    counts = x.flatten().bincount(minlength=high).double()
    assert len(counts) == high
    chi_squared = float(((counts - 2 * n / high) ** 2 / (2 * n / high)).sum())
    assert chi_squared < 22.5  # 99.9 % of the distribution with 6 degrees of freedom


def test_choices_are_as_likely_as_their_logits_say() -> None:
    n = 60_000
    logits_V = torch.tensor([-math.inf, 0.3, -1.0, -math.inf, 1.2, -math.inf])
    x = make(n).categorical(logits_V.expand(n, 2, -1))
    assert x.shape == (n, 2)
    counts, expected = x.flatten().bincount(minlength=6).double(), logits_V.double().softmax(0) * 2 * n
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    assert float(((counts - expected)[possible] ** 2 / expected[possible]).sum()) < 13.8  # 99.9 %, 2 degrees of freedom


def test_the_largest_number_chooses_the_last_possible_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding would lift it to the sum of all chances, which no choice lies above."""
    logits = torch.randn(500, 11, generator=torch.Generator().manual_seed(0))
    logits[:, -2:] = -math.inf
    draws = make(500)
    monkeypatch.setattr(draws, "_uniform", lambda count, dtype: torch.full((500, count), 1 - 2.0**-53, dtype=dtype))
    assert (draws.categorical(logits) == 8).all()


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**62), st.randoms(use_true_random=False))
def test_a_row_depends_on_its_key_alone(rows: int, count: int, seed: int, random: object) -> None:
    """Any subset in any order, after any number of draws together."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed % 1000))[: rows // 2 + 1]
    together, apart = Draws.of(seed, torch.arange(rows)), Draws.of(seed, order)
    for draw in (lambda d: d.normal(count), lambda d: d.uniform(2, count), lambda d: d.integers(5), lambda d: d.normal(3)):
        assert torch.equal(draw(together)[order], draw(apart))
    assert torch.equal(together.select(order).normal(count), apart.normal(count))


def test_selected_rows_go_on_where_they_stand() -> None:
    draws = make(6)
    draws.normal(5)
    index = torch.tensor([4, 1])
    chosen = draws.select(index)
    assert torch.equal(chosen.uniform(3), draws.uniform(3)[index])
    mask = torch.tensor([False, True, False, False, True, False])
    assert torch.equal(draws.select(mask).keys_B, draws.keys_B[mask])


def test_names_of_rows_and_their_order_count() -> None:
    a, b = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 3])
    streams = [
        Draws.of(0, a),
        Draws.of(0, b),
        Draws.of(1, a),
        Draws.of(0, a, b),
        Draws.of(0, b, a),
        Draws.of(0, a, 0),
        Draws.of(0, a, 1),
    ]
    keys = [int(stream.keys_B[0]) for stream in streams]
    assert len(set(keys)) == len(keys)


def test_numbers_stay_what_they_are() -> None:
    """A seed means the same numbers in the next version too: splitmix64 by hand, from its published constants."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    seed, name, other = 5, 11, 3
    key = mix(mix(name ^ mix(seed)) ^ other)
    draws = Draws.of(seed, torch.tensor([name]), torch.tensor([other]))
    bits = [mix((key + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(4)]
    assert draws.uniform(2)[0].tolist() == [(x >> 40) / 2**24 for x in bits[:2]]
    u, v = ((x >> 11) / 2**53 for x in bits[2:])
    expected = math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
    assert float(draws.normal(1, dtype=torch.float64)) == pytest.approx(expected, abs=1e-14)
