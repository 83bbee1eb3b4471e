"""Observers of the distribution: a histogram that grows with its data, and ranges chosen from it.

Bins lie on a grid that does not depend on the data: widths are powers of two and edges are multiples of the width. So
histograms of different ranges always fit together: growing the range, or merging, adds whole bins and never splits one, the
mass is kept exactly, and the result depends neither on the order of the batches nor on how processes share them (but for values
within float32's rounding of an edge, and which elements of large batches are counted).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.observers.observer import Observer, qparams_of_range

_BITS = 12
_BINS = 1 << _BITS  # at most; at least half as many span the data
_FINEST = -100  # exponent of the narrowest bin: about 1e-30
_MANTISSA = 20  # bins are at least 2^-20 of the largest value, so that float32 tells their edges apart
_THRESHOLDS = 64  # of the entropy search


class Histogram(Observer):
    """The distribution of a tensor in 2,049 to 4,096 bins between its extremes, which are the range.

    `Percentile`, `MSE` and `Entropy` choose a narrower range from it.

    Args:
        samples_per_batch: Elements of a batch that are counted, spread evenly over it; None counts all. The extremes are those
            of all elements either way.
        bits, symmetric, tolerance, name: As for every `Observer`.

    Example:
        >>> observer = hb.observers.Histogram()
        >>> for _ in range(4):
        ...     observer.update(torch.randn(1000))
        >>> int(observer.counts.sum()), abs(observer.quantile(0.5)) < 0.1
        (4000, True)
    """

    def __init__(self, *, samples_per_batch: int | None = 1 << 14, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if samples_per_batch is not None and samples_per_batch < 1:
            raise ValueError(f"samples_per_batch={samples_per_batch} is not positive; use e.g. 65536, or None for all")
        self.samples_per_batch = samples_per_batch
        self._reset()

    def _own_options(self) -> Sequence[str]:
        return ("samples_per_batch",)

    def _reset(self) -> None:
        self.counts = torch.zeros(0, dtype=torch.int64)
        self._exponent, self._first = _FINEST, 0  # bin i holds [first + i, first + i + 1) * 2^exponent
        self._low, self._high = math.inf, -math.inf

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self._exponent

    @property
    def low(self) -> float:
        """Lower edge of the first bin."""
        return self._first * self.width

    @property
    def high(self) -> float:
        """Upper edge of the last bin."""
        return (self._first + len(self.counts)) * self.width

    def quantile(self, q: float) -> float:
        """The value below which a part `q` of the elements lies, as if spread evenly within bins."""
        cumulative = self.counts.cumsum(0, dtype=torch.float64)
        target = q * float(cumulative[-1])
        index = min(int(torch.searchsorted(cumulative, target)), len(self.counts) - 1)
        count = int(self.counts[index])
        part = (target - (float(cumulative[index]) - count)) / count if count else 0.0
        value = (self._first + index + part) * self.width
        return min(max(value, self._low), self._high)

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._cover(float(low), float(high))
        ops.histogram_update_(self.counts, self._sampled(x), low=self.low, high=self.high, name=self.name)

    def _sampled(self, x: Tensor) -> Tensor:
        if self.samples_per_batch is None or x.numel() <= self.samples_per_batch:
            return x
        # Odd, so that it walks through all channels and columns; another offset each time.
        stride = -(-x.numel() // self.samples_per_batch) | 1
        return x.reshape(-1)[self.batches % stride :: stride]

    def _merge(self, other: Histogram) -> None:
        self._cover(other._low, other._high)
        moved = other._coarsened(max(self._exponent, other._exponent))
        if other._exponent > self._exponent:
            self.counts, self._first = self._coarsened(other._exponent)
            self._exponent = other._exponent
        counts, first = moved
        begin, end = min(self._first, first), max(self._first + len(self.counts), first + len(counts))
        total = torch.zeros(end - begin, dtype=torch.int64)
        for part, at in ((self.counts, self._first), (counts, first)):
            total[at - begin : at - begin + len(part)] += part
        self.counts, self._first = total, begin

    def _cover(self, low: float, high: float) -> None:
        """Widens the range; bins are merged in pairs (by 2, 4, 8, …) where there would be too many."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        exponent = max(self._exponent, _finest_exponent(self._low, self._high))
        if _bin(self._high, exponent) - _bin(self._low, exponent) >= _BINS:
            exponent += 1
        counts, first = self._coarsened(exponent)
        begin, end = _bin(self._low, exponent), _bin(self._high, exponent) + 1
        if len(counts):
            begin, end = min(begin, first), max(end, first + len(counts))
        if (begin, end, exponent) != (self._first, self._first + len(self.counts), self._exponent):
            total = torch.zeros(end - begin, dtype=torch.int64)
            total[first - begin : first - begin + len(counts)] = counts
            self.counts, self._first, self._exponent = total, begin, exponent

    def _coarsened(self, exponent: int) -> tuple[Tensor, int]:
        """Counts and number of the first bin, in bins of another width."""
        shift = exponent - self._exponent
        if shift == 0 or not len(self.counts):
            return self.counts, self._first >> shift
        first = self._first >> shift
        into = ((torch.arange(len(self.counts)) + self._first) >> min(shift, 62)) - first
        return torch.zeros(int(into[-1]) + 1, dtype=torch.int64).index_add_(0, into, self.counts), first

    def _range(self) -> tuple[Tensor, Tensor]:
        low, high = self._chosen()
        return torch.tensor(low), torch.tensor(high)

    def _chosen(self) -> tuple[float, float]:
        return self._low, self._high


class Percentile(Histogram):
    """The range that leaves `100 - percentile` percent of the values out at each end.

    Args:
        percentile: More than 50, at most 100.
        samples_per_batch, bits, symmetric, tolerance, name: As for `Histogram`.

    Example:
        >>> observer = hb.observers.Percentile(99)
        >>> observer.update(torch.arange(1001.0))
        >>> round(float(observer.range().low), -1), round(float(observer.range().high), -1)
        (10.0, 990.0)
    """

    def __init__(self, percentile: float = 99.9, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile} is not in (50, 100]; use e.g. 99.9")
        self.percentile = percentile

    def _own_options(self) -> Sequence[str]:
        return ("percentile", "samples_per_batch")

    def _chosen(self) -> tuple[float, float]:
        return self.quantile(1 - self.percentile / 100), self.quantile(self.percentile / 100)


class MSE(Histogram):
    """The range with the smallest mean squared error of the quantized values, `ops.search_histogram`.

    What `torch.ao.quantization.HistogramObserver` looks for; its search is greedier and takes its histogram to be exact.

    Example:
        >>> observer = hb.observers.MSE(bits=4)
        >>> observer.update(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
        >>> 2 < float(observer.range().high) < 3  # of 4.2: outliers are cut off
        True
    """

    def _chosen(self) -> tuple[float, float]:
        low, high, _ = ops.search_histogram(
            self.counts, low=self.low, high=self.high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric
        )
        if self.symmetric:
            return max(low, -max(-self._low, self._high)), min(high, max(-self._low, self._high))
        return max(low, min(self._low, 0.0)), min(high, max(self._high, 0.0))  # not the edges of the bins


class Entropy(Histogram):
    """The threshold whose codes keep most information: the smallest KL divergence between values clipped and quantized.

    Thresholds `T` are tried from an eighth of the largest magnitude to all of it; the range is what lies between `-T` and `T`.
    Both distributions are of the histogram's bins, as in Migacz, *8-bit inference with TensorRT* (2017), which this follows
    but for the sign: values of both signs are quantized apart.
    """

    def _chosen(self) -> tuple[float, float]:
        largest = max(-self._low, self._high)
        best, chosen = math.inf, (self._low, self._high)
        for step in range(_THRESHOLDS, _THRESHOLDS // 8, -1):
            threshold = largest * step / _THRESHOLDS
            low, high = max(self._low, -threshold), min(self._high, threshold)
            divergence = self._divergence(low, high)
            if divergence < best:
                best, chosen = divergence, (low, high)
        return chosen

    def _divergence(self, low: float, high: float) -> float:
        """KL divergence of the clipped values from what quantizing those inside to `low … high` leaves of them."""
        begin = max(math.floor(low / self.width) - self._first, 0)
        end = min(math.floor(high / self.width) - self._first + 1, len(self.counts))
        inside = self.counts[begin:end].double()
        if not len(inside) or float(inside.sum()) == 0:
            return math.inf
        clipped = inside.clone()
        clipped[0] += float(self.counts[:begin].sum())
        clipped[-1] += float(self.counts[end:].sum())
        scale, zero_point = qparams_of_range(
            torch.tensor(low), torch.tensor(high), qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric
        )
        centers = (torch.arange(begin, end) + self._first + 0.5) * self.width
        codes = torch.clamp(torch.round(centers / scale) + zero_point, self.qmin, self.qmax).long() - self.qmin
        levels = self.qmax - self.qmin + 1
        filled = (inside > 0).double()
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, inside)
        spread = torch.zeros(levels, dtype=torch.float64).index_add_(0, codes, filled)
        quantized = (mass / spread.clamp(min=1))[codes] * filled  # shared evenly by the bins that hold anything
        p, q = clipped / clipped.sum(), quantized / quantized.sum()
        used = p > 0
        return float((p[used] * torch.log(p[used] / q[used].clamp(min=1e-12))).sum())


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _finest_exponent(low: float, high: float) -> int:
    """The smallest exponent at which bins between the two are not too many and not too fine; one too small at an odd edge."""
    span, largest = math.frexp(high - low)[1], math.frexp(max(-low, high))[1]
    return max(_FINEST, span - _BITS if high > low else _FINEST, largest - _MANTISSA if low or high else _FINEST)
