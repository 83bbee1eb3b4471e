"""What all observers share: checks, counting, how sure a range is, and merging across processes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import QuantizationError
from halfbyte.ops.checks import FLOAT_DTYPES

O = TypeVar("O", bound="Observer")  # noqa: E741, the field's letter

_TINY = torch.finfo(torch.float32).tiny
_LARGEST = 2.0**125  # beyond it, the width of a range may leave float32
_FEWEST_BATCHES = 8  # before a range can count as settled


@dataclass(frozen=True, slots=True)
class ObservedRange:
    """What an observer knows of a tensor.

    Attributes:
        low, high: The range that its qparams cover, zero not yet included; float32, a number or `[C]` per axis.
        low_band, high_band: How far each end has moved since a quarter of the batches had been seen, the larger move of two
            (from a quarter to now, from half to now); infinite before there was one. The estimate from half the data is off
            by as much as the final one is uncertain, so this is a one-sigma band where the end is a mean or a quantile, and
            what more data may still add where it is an extreme.
        samples: Elements seen.
        batches: Batches seen, empty ones not counted.
        converged: At least eight batches, and no end has moved by more than the observer's `tolerance` of the range.
    """

    low: Tensor
    high: Tensor
    low_band: Tensor
    high_band: Tensor
    samples: int
    batches: int
    converged: bool


class Observer(ABC):
    """Base of the observers.

    Args:
        bits: Width of the codes.
        symmetric: Zero is code 0 and the range is `-T` to `T`; else codes are unsigned and the range has a zero point.
        axis: Dimension whose indices are observed apart, or None for the whole tensor.
        tolerance: Part of the range that its ends may have moved since a quarter of the batches, to count as converged.
        name: What error messages call the tensor.

    Raises:
        ValueError: an option out of range.
    """

    per_axis = False  # whether `axis` may be given

    def __init__(
        self,
        *,
        bits: int = 8,
        symmetric: bool = False,
        axis: int | None = None,
        tolerance: float = 0.05,
        name: str = "x",
    ) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits} is not supported; use 2 to 8")
        if axis is not None and not self.per_axis:
            raise ValueError(f"{type(self).__name__} observes whole tensors; use axis=None, or MinMax(axis={axis})")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance} is not in (0, 1); use e.g. 0.05")
        self.bits, self.symmetric, self.axis, self.tolerance, self.name = bits, symmetric, axis, tolerance, name
        self.samples = self.batches = 0
        self._earlier: list[tuple[int, Tensor, Tensor]] = []  # range after 1, 2, 4, … batches: the last three

    @property
    def qmin(self) -> int:
        """Smallest code: `-2^(bits-1)` if symmetric, else 0."""
        return -self.qmax - 1 if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def fresh(self: O, *, bits: int, symmetric: bool, name: str) -> O:
        """An observer with the same options that has seen nothing, for other codes."""
        new = copy.copy(self)
        new.bits, new.symmetric, new.name = bits, symmetric, name
        new.samples = new.batches = 0
        new._earlier = []
        new._reset()
        return new

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds a batch of any shape; an empty one changes nothing.

        Raises:
            TypeError: `x` is no floating-point tensor.
            QuantizationError: NaN, inf, or numbers past 2^125; nothing is added.
        """
        if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self.name} is {found}; observers take float32, bfloat16 or float16 tensors")
        if x.numel() == 0:
            return
        low, high = ops.observe_minmax(x.detach(), axis=self.axis)
        largest = float(torch.maximum(high, -low).max()) if low.dim() else max(float(high), -float(low))
        if not largest <= _LARGEST:  # NaN too
            what = "NaN" if bool(torch.isnan(low).any()) else "inf, or numbers too large to quantize"
            raise QuantizationError(f"{self.name}: {what}")
        self._add(x.detach(), low, high)
        self.samples += x.numel()
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            self._earlier = [*self._earlier[-2:], (self.batches, *self._range())]

    def merge(self: O, other: O) -> None:
        """Adds what another observer with the same options has seen.

        Raises:
            ValueError: it has other options.
        """
        if type(self) is not type(other) or self._options() != other._options():
            raise ValueError(f"{self.name}: {other!r} cannot be merged into {self!r}; give both the same options")
        if other.batches == 0:
            return
        parts = [(o.batches, *o._range()) for o in (self, other) if o.batches]
        self._merge(other)
        self.samples += other.samples
        self.batches += other.batches
        self._earlier = sorted([*self._earlier, *other._earlier, *parts], key=lambda part: part[0])[-3:]

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merges the observers of all processes of a `torch.distributed` group; all of them get the same result."""
        observers: list[Observer | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(observers, self, group=group)
        merged = self.fresh(bits=self.bits, symmetric=self.symmetric, name=self.name)
        for observer in observers:
            assert observer is not None
            merged.merge(observer)
        self.__dict__.update(merged.__dict__)

    def range(self) -> ObservedRange:
        """The range that the qparams cover, and how sure it is.

        Raises:
            QuantizationError: nothing was seen.
        """
        if self.batches == 0:
            raise QuantizationError(f"{self.name}: no data was seen")
        low, high = self._range()
        moves = [
            next(((a, b) for batches, a, b in reversed(self._earlier) if batches <= self.batches * part), None)
            for part in (0.5, 0.25)
        ]
        known = [move for move in moves if move is not None]
        if not known:
            infinite = torch.full_like(low, torch.inf)
            return ObservedRange(low, high, infinite, infinite, self.samples, self.batches, converged=False)
        low_band = torch.stack([(low - a).abs() for a, _ in known]).amax(0)
        high_band = torch.stack([(high - b).abs() for _, b in known]).amax(0)
        allowed = self.tolerance * (torch.clamp(high, min=0) - torch.clamp(low, max=0))
        settled = bool((torch.maximum(low_band, high_band) <= allowed).all())
        converged = self.batches >= _FEWEST_BATCHES and settled
        return ObservedRange(low, high, low_band, high_band, self.samples, self.batches, converged)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """`(scale, zero_point)` of the range, float32 and int32: a number each, or `[C]` per axis.

        Raises:
            QuantizationError: nothing was seen.
        """
        seen = self.range()
        return qparams_of_range(seen.low, seen.high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({options})"

    def _options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("bits", "symmetric", "axis", "tolerance", *self._own_options())}

    def _own_options(self) -> Sequence[str]:
        return ()

    @abstractmethod
    def _reset(self) -> None: ...

    @abstractmethod
    def _add(self, x: Tensor, low: Tensor, high: Tensor) -> None: ...

    @abstractmethod
    def _merge(self: O, other: O) -> None: ...

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]: ...


def qparams_of_range(low: Tensor, high: Tensor, *, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)` whose codes cover `low` to `high` and zero.

    Asymmetric: `scale = (high - low) / (qmax - qmin)`, `zero_point = qmin - round(low / scale)`, what PyTorch's observers
    compute. Symmetric: `scale = max(-low, high) / qmax`; PyTorch divides by `(qmax - qmin) / 2`, half a code more with 256
    codes. A range that is zero alone gets scale 1.

    Example:
        >>> qparams_of_range(torch.tensor(-1.0), torch.tensor(1.55), qmin=0, qmax=255, symmetric=False)
        (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    low, high = torch.clamp(low.float(), max=0), torch.clamp(high.float(), min=0)
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / float(qmax - qmin)
    scale = torch.where(high > low, torch.clamp(scale, min=_TINY), torch.ones_like(scale))
    if symmetric:
        return scale, torch.zeros(scale.shape, dtype=torch.int32)
    return scale, torch.clamp(qmin - torch.round(low / scale), qmin, qmax).to(torch.int32)
