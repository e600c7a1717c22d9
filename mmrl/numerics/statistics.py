"""Confidence intervals for what is reported: success rates and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for a success probability, within [0, 1] and sensible at 0 and at all successes.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). No trials: (0, 1).
    """
    if trials == 0:
        return 0.0, 1.0
    if not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval got {successes} successes of {trials} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - spread) / scale  # the bounds are exact there, rounding aside
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of Student's t interval: mean +- t(n - 1) s / sqrt(n). One value: the half width is infinite."""
    if not values:
        raise ValueError("mean_interval got no values")
    n = len(values)
    if n == 1:
        return float(values[0]), math.inf
    return fmean(values), student_quantile(confidence, n - 1) * stdev(values) / math.sqrt(n)


def percent(values: Sequence[float], confidence: float = 0.95) -> str:
    """The mean of shares such as success rates over seeds, with its t interval where there are several.

    >>> percent([0.5]), percent([0.5, 0.5, 0.53])
    ('50.0 %', '51.0 ± 4.3 %')
    """
    mean, half = mean_interval([100 * value for value in values], confidence)
    return f"{mean:.1f} %" if math.isinf(half) else f"{mean:.1f} ± {half:.1f} %"


def student_quantile(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with probability ``confidence``, T Student's t with ``freedom`` (a whole number) degrees.

    Bisection of the exact distribution function, over the angle atan(t / sqrt(freedom)) between 0 and pi / 2.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"student_quantile needs freedom >= 1 and 0 < confidence < 1, got {freedom} and {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _student_within(angle: float, freedom: int) -> float:
    """P(|T| < tan(angle) sqrt(freedom)): the finite series of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine * cosine * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    series = math.sin(angle) * total
    return 2 / math.pi * (angle + series) if odd else series
