"""How well a mean or a median is known: 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def margin_of_mean(deviation: float, count: int) -> float:
    """Half width of the interval of a mean, from the standard deviation of `count` independent values; inf below two."""
    return _Z95 * deviation / math.sqrt(count) if count > 1 else math.inf


def margin_of_median(values: Sequence[float]) -> float:
    """Half width of the interval of a median, from the order statistics around it; inf below five values."""
    ordered, n = sorted(values), len(values)
    if n < 5:
        return math.inf
    half = _Z95 / 2 * math.sqrt(n)  # standard deviation of a binomial, in ranks
    low, high = ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]
    return (high - low) / 2
