"""Oracles: published intervals and quantiles, the equation that defines each bound, numerical integration of the density."""

import math

import pytest
import torch

from mmrl.numerics.statistics import mean_interval, student_quantile, wilson_interval

# R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), NEWCOMBE)
def test_wilson_interval_has_the_published_bounds(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_bounds_solve_the_score_equation():
    for bound in wilson_interval(37, 50, confidence=0.9):
        assert abs(0.74 - bound) == pytest.approx(1.6448536 * math.sqrt(bound * (1 - bound) / 50), rel=1e-7)


def test_wilson_is_symmetric_and_exact_at_the_ends():
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 9)[0] == 0 and wilson_interval(9, 9)[1] == 1
    assert wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        wilson_interval(5, 4)


PUBLISHED_T = [
    (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 5, 2.571), (0.95, 10, 2.228),
    (0.95, 29, 2.045), (0.95, 30, 2.042), (0.95, 100, 1.984), (0.99, 1, 63.657), (0.99, 2, 9.925), (0.99, 4, 4.604),
    (0.9, 7, 1.895),
]  # fmt: skip


@pytest.mark.parametrize(("confidence", "freedom", "quantile"), PUBLISHED_T)
def test_student_quantile_has_the_published_value(confidence, freedom, quantile):
    assert student_quantile(confidence, freedom) == pytest.approx(quantile, abs=5.1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 5, 8])
def test_student_quantile_holds_the_mass_of_the_density(freedom):
    t = student_quantile(0.8, freedom)
    x = torch.linspace(-t, t, 20001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.8, abs=1e-7)


def test_student_quantile_refuses_nonsense():
    with pytest.raises(ValueError, match="freedom >= 1"):
        student_quantile(0.95, 0)


def test_mean_interval_by_hand():
    mean, half_width = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half_width) == pytest.approx((2.0, 4.30265 / math.sqrt(3)), rel=1e-5)
    assert mean_interval([4.0]) == (4.0, math.inf)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
