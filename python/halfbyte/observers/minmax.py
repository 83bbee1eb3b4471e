"""Observers of the ends alone: the extremes, or a moving average of each batch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.observers.observer import Observer


class MinMax(Observer):
    """The smallest and the largest value seen; equal to `torch.ao.quantization.MinMaxObserver` bit for bit.

    Takes `axis` (torch's `PerChannelMinMaxObserver`).

    Example:
        >>> observer = hb.observers.MinMax()
        >>> observer.update(torch.tensor([-1.0, 0.5]))
        >>> observer.update(torch.tensor([1.55]))
        >>> observer.qparams()
        (tensor(0.0100), tensor(100, dtype=torch.int32))
    """

    per_axis = True
    _low: Tensor | None = None
    _high: Tensor | None = None

    def _reset(self) -> None:
        self._low = self._high = None

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def _merge(self, other: MinMax) -> None:
        low, high = other._range()
        self._add(low, low, high)

    def _range(self) -> tuple[Tensor, Tensor]:
        assert self._low is not None and self._high is not None
        return self._low, self._high


class MovingAverageMinMax(MinMax):
    """An exponential moving average of each batch's extremes; torch's `MovingAverageMinMaxObserver` bit for bit.

    Merging averages both by the number of batches they saw.

    Args:
        momentum: What the newest batch counts, torch's `averaging_constant`; the first batch counts fully.
        bits, symmetric, axis, tolerance, name: As for every `Observer`.
    """

    def __init__(self, *, momentum: float = 0.01, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum} is not in (0, 1]; use e.g. 0.01")
        self.momentum = momentum

    def _own_options(self) -> Sequence[str]:
        return ("momentum",)

    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self._low = low if self._low is None else self._low + self.momentum * (low - self._low)
        self._high = high if self._high is None else self._high + self.momentum * (high - self._high)

    def _merge(self, other: MinMax) -> None:
        low, high = other._range()
        part = other.batches / (self.batches + other.batches)
        self._low = low if self._low is None else self._low + part * (low - self._low)
        self._high = high if self._high is None else self._high + part * (high - self._high)
