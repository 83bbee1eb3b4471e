"""Histograms that calibration adds to batch by batch, and the range of codes that loses least of what they hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte import _extension  # registers torch.ops.halfbyte
from halfbyte.ops.checks import check_float, check_range

__all__ = ["grow_histogram", "histogram_update_", "search_histogram"]

_extension.check_extension()

_histogram_update = torch.ops.halfbyte.histogram_update_.default
_search_histogram = torch.ops.halfbyte.search_histogram.default


def histogram_update_(counts: Tensor, x: Tensor, *, low: float, high: float, name: str = "x") -> Tensor:
    """Counts the values of `x` into equal bins between `low` and `high`, in one pass over memory.

    The bin is `clamp(floor((x - low) * (bins / (high - low))), 0, bins - 1)` in float32: values outside the range,
    infinities included, are counted in the end bins, so that `counts.sum()` grows by `x.numel()`.

    Args:
        counts: `[bins]`, contiguous, int64 or float64; changed in place.
        x: Any shape; float32, bfloat16 or float16.
        low: Lower end of the first bin.
        high: Upper end of the last bin.
        name: What error messages call `x`.

    Returns:
        `counts`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `counts` or the range do not fit, or `x` holds NaN; `counts` is unchanged then.

    Example:
        >>> import torch, halfbyte as hb
        >>> counts = torch.zeros(4, dtype=torch.int64)
        >>> hb.ops.histogram_update_(counts, torch.tensor([0.0, 0.3, 0.9, 7.0]), low=0.0, high=1.0)
        tensor([1, 1, 0, 2])
    """
    check_float(x, name)
    _check_counts(counts)
    _check_bounds(low, high, counts.numel())
    nans = int(_histogram_update(counts, x.detach(), low, high))
    if nans > 0:
        raise ValueError(f"{name} of shape {tuple(x.shape)} holds {nans} NaN; a histogram has no bin for them")
    return counts


def grow_histogram(
    counts: Tensor, *, low: float, high: float, to_low: float, to_high: float
) -> tuple[Tensor, float, float]:
    """A histogram over a wider range, with as many bins: neighbouring bins are merged in pairs until the range is covered.

    Each step doubles the range, downwards where `to_low` lies below it and else upwards. No count is split or lost, and a value
    falls into the merged bin of the bin it fell into before.

    Args:
        counts: `[bins]`, an even number of them.
        low: Lower end of the first bin.
        high: Upper end of the last bin.
        to_low: Smallest value that the new range shall hold.
        to_high: Largest value that it shall hold.

    Returns:
        `(counts, low, high)`: a new tensor unless nothing had to grow, and its range.

    Raises:
        ValueError: The number of bins is odd, or a bound is not finite.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.grow_histogram(torch.tensor([1, 2, 3, 4]), low=0.0, high=1.0, to_low=0.0, to_high=1.5)
        (tensor([3, 7, 0, 0]), 0.0, 2.0)
    """
    _check_counts(counts)
    bins = counts.numel()
    _check_bounds(low, high, bins)
    if bins % 2 != 0:
        raise ValueError(f"counts has {bins} bins, an odd number; merging pairs needs an even one")
    if not (math.isfinite(to_low) and math.isfinite(to_high)):
        raise ValueError(f"to_low={to_low}, to_high={to_high} is not finite")
    while to_low < low or to_high > high:
        merged = counts.view(-1, 2).sum(dim=1)
        empty = torch.zeros_like(merged)
        if to_low < low:
            low, counts = low - (high - low), torch.cat([empty, merged])
        else:
            high, counts = high + (high - low), torch.cat([merged, empty])
    return counts, low, high


def search_histogram(
    counts: Tensor, *, low: float, high: float, qmin: int, qmax: int, symmetric: bool
) -> tuple[float, float, float]:
    """The range to quantize with that loses least: the smallest `sum(counts * (x_hat - x)**2)`.

    Values count as spread evenly within their bin. Ranges contain zero; their asymmetric zero point is an integer when their
    error is taken. A coarse search over both ends is refined step by step, so the range found is a local minimum, never
    worse than the whole range.

    Args:
        counts: `[bins]`, contiguous, int64 or float64, not negative.
        low: Lower end of the first bin.
        high: Upper end of the last bin.
        qmin: Smallest code.
        qmax: Largest code.
        symmetric: Zero is code 0 and the range is `-T` to `T` with `T = scale * qmax`.

    Returns:
        `(low, high, error)`: the range, and its mean squared error; zeros for a histogram that holds nothing.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `counts` or the ranges do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> counts = torch.tensor([1000, 1000, 1000, 1000] + 59 * [0] + [1])  # an outlier among values below 4
        >>> low, high, _ = hb.ops.search_histogram(counts, low=0.0, high=64.0, qmin=0, qmax=3, symmetric=False)
        >>> low, high < 32
        (0.0, True)
    """
    _check_counts(counts)
    _check_bounds(low, high, counts.numel())
    check_range(qmin, qmax)
    if qmax < 1:
        raise ValueError(f"qmax={qmax} leaves no code for positive values; use a positive qmax")
    best = _search_histogram(counts, low, high, qmin, qmax, symmetric)
    best_low, best_high, error = best.tolist()
    return best_low, best_high, error


def _check_counts(counts: Tensor) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts is a {type(counts).__name__}; pass a torch.Tensor")
    if counts.dtype not in (torch.int64, torch.float64):
        raise TypeError(f"counts has dtype {counts.dtype}; use torch.int64 or torch.float64")
    if counts.dim() != 1 or counts.numel() == 0 or not counts.is_contiguous():
        raise ValueError(f"counts has shape {tuple(counts.shape)}; use a contiguous vector with at least one bin")


def _check_bounds(low: float, high: float, bins: int) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low={low}, high={high} is not a range; both must be finite and low < high")
    # The widths must be normal numbers of float32, in which the bins are found.
    if not 2.0**-120 < (high - low) / bins < 2.0**120 or max(-low, high) > 2.0**126:
        raise ValueError(f"low={low}, high={high} in {bins} bins is too fine or too wide for float32")


def _histogram_update_fake(counts: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return counts.new_empty((), dtype=torch.int64)


torch.library.register_fake("halfbyte::histogram_update_", _histogram_update_fake)


def _search_histogram_fake(counts: Tensor, low: float, high: float, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    return counts.new_empty(3, dtype=torch.float64)


torch.library.register_fake("halfbyte::search_histogram", _search_histogram_fake)
