"""Statistics in passes against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.data.running import Moments, Quantiles

LEVELS = (0.0, 0.01, 0.25, 0.5, 0.99, 1.0)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def passes(x: torch.Tensor, pieces: int) -> torch.Tensor:
    quantiles = Quantiles(x.shape[1], LEVELS)
    for part in x.chunk(pieces):
        quantiles.first(part)
    for part in x.flip(0).chunk(pieces + 1):  # the order means nothing
        quantiles.second(part)
    return quantiles.result()


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=1, max_size=40), st.integers(1, 4))
def test_quantiles_are_numpy_s(numbers: list[float], pieces: int) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)[:, None]
    expected = np.quantile(x.double().numpy(), LEVELS, axis=0)
    np.testing.assert_allclose(passes(x, pieces).numpy(), expected, rtol=1e-12, atol=1e-300)


def test_quantiles_of_many_and_of_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, generator=generator)
    x = torch.stack([normal, normal * 1e-20, (normal > 1).float() * 2 - 1, torch.full((5000,), -0.0), normal.round()], 1)
    np.testing.assert_allclose(passes(x, 7).numpy(), np.quantile(x.double().numpy(), LEVELS, axis=0), rtol=1e-12, atol=0)


def test_moments_are_numpy_s() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 3, generator=generator) * torch.tensor([1.0, 1e-3, 0.0]) + torch.tensor([0.0, 1e4, 7.0])
    moments = Moments(3)
    for part in (x[:1], x[1:1], x[1:700], x[700:]):
        moments.update(part)
    exact = x.double().numpy()
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean_D.numpy(), exact.mean(0), rtol=1e-12, atol=1e-15)
    for unbiased in (False, True):
        np.testing.assert_allclose(moments.std_D(unbiased=unbiased).numpy(), exact.std(0, ddof=int(unbiased)), rtol=1e-8)
    assert moments.min_D.tolist() == exact.min(0).tolist() and moments.max_D.tolist() == exact.max(0).tolist()


def test_one_vector_has_no_spread() -> None:
    moments = Moments(2)
    moments.update(torch.tensor([[3.0, -1.0]]))
    assert moments.std_D(unbiased=True).tolist() == [0.0, 0.0] == moments.std_D(unbiased=False).tolist()
    assert moments.mean_D.tolist() == [3.0, -1.0]


@pytest.mark.parametrize("value", [0.0, -3.25, 1e30])
def test_a_constant_is_every_quantile_of_itself(value: float) -> None:
    assert passes(torch.full((9, 1), value), 2)[:, 0].tolist() == [torch.tensor(value).item()] * len(LEVELS)
