"""Histograms that calibration adds to batch by batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte import _extension  # registers torch.ops.halfbyte
from halfbyte.ops.checks import check_float

__all__ = ["grow_histogram", "histogram_update_"]

_extension.check_extension()

_histogram_update = torch.ops.halfbyte.histogram_update_.default


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
