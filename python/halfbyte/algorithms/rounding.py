"""Rounding algorithms: from float weights to integers and scales, one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from halfbyte import functional, ops
from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback
from halfbyte.formats import CodebookFormat, PackedFormat, PerTensor
from halfbyte.hessian import InputHessian
from halfbyte.nn.packed_weight import WeightCodes


@runtime_checkable
class Rounding(Protocol):
    """What `quantize_(..., algorithms=[...])` accepts to choose the integers of a weight."""

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be given."""
        ...

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Integers and qparams of some rows of a weight.

        Args:
            weight: `[rows, I]`, floating point, finite; all rows if they share one scale.
            weight_format: Target format; its group size divides `I`.
            importance: `[I]` float32, mean square of each input over the calibration data, or None without data.
        """
        ...


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """A whole weight, rounded, and what had to be done otherwise than asked."""

    codes: WeightCodes
    fallbacks: tuple[Fallback, ...] = ()


@runtime_checkable
class HessianRounding(Rounding, Protocol):
    """A rounding that looks at how the inputs of a layer go together: it gets each Linear whole, with their Hessian.

    Its `round` is called for what has no such inputs: tables.
    """

    @property
    def needs_drift(self) -> bool:
        """Whether the float model's inputs are compared with those that the quantized layers before produce."""
        ...

    @property
    def by_groups(self) -> bool:
        """Whether convolutions with groups come as one weight a group, with its own Hessian, or whole, with the mean of all."""
        ...

    def round_layer(self, name: str, weight: Tensor, weight_format: PackedFormat, inputs: InputHessian) -> RoundedLayer:
        """Integers and qparams of a weight.

        Args:
            name: Qualified name of the layer, for messages.
            weight: `[O, I]`, floating point, finite.
            weight_format: Target format; its group size divides `I`.
            inputs: Second moments of the inputs over the calibration data.
        """
        ...


@dataclass(frozen=True, slots=True)
class RTN:
    """Round to nearest on the range of each group: min to max, nothing searched. With a codebook: on `absmax`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> report = hb.quantize_(model, hb.int8_weight_only(), algorithms=[hb.algorithms.RTN()], progress=False)
    """

    @property
    def needs_data(self) -> bool:
        """Never."""
        return False

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Integers on the min/max grid; `importance` is not used."""
        return _round_to_searched_grid(weight, weight_format, None, grid=1, max_shrink=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MSE:
    """Scales that minimise the squared error, searched over shrunken ranges and refined by least squares.

    With calibration data an error counts by the mean square of the input it multiplies, which is its expected effect on the
    layer's output when inputs are uncorrelated (the "importance matrix" of ggml); without data all errors count the same.

    Args:
        grid: Number of ranges tried: `p = 1 - j * max_shrink / grid` times min/max, j = 0 … grid - 1.
        max_shrink: Largest part of the range that is cut off, as in GPTQ's range search (0.8 there).
        weighting: "auto" weights by data where data is given, "data" demands data, "none" never weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> mse = hb.algorithms.MSE(weighting="data")
        >>> batches = [torch.randn(8, 64) for _ in range(4)]
        >>> report = hb.quantize_(model, hb.int4_weight_only(32), data=batches, algorithms=[mse], progress=False)
    """

    grid: int = 64
    max_shrink: float = 0.8
    weighting: str = "auto"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid={self.grid} is not positive; use e.g. 64")
        if not 0.0 <= self.max_shrink < 1.0:
            raise ValueError(f"max_shrink={self.max_shrink} is not in [0, 1); use e.g. 0.8")
        if self.weighting not in ("auto", "data", "none"):
            raise ValueError(f"weighting={self.weighting!r} is unknown; use 'auto', 'data' or 'none'")

    @property
    def needs_data(self) -> bool:
        """With `weighting="data"`."""
        return self.weighting == "data"

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Integers on the grid with the smallest (weighted) squared error."""
        if self.weighting == "data" and importance is None:
            raise QuantizationError("MSE(weighting='data') needs calibration data; pass data=... or weighting='auto'")
        weights = None if self.weighting == "none" else importance
        return _round_to_searched_grid(weight, weight_format, weights, grid=self.grid, max_shrink=self.max_shrink)


def default_rounding(weight_format: PackedFormat) -> Rounding:
    """What is used when no algorithm is named: min/max at 8 bits, where nothing is gained by clipping; MSE below.

    Codebooks such as NF4 are defined with the largest magnitude of a group as its scale, so that is what they get.
    """
    return RTN() if weight_format.bits == 8 or isinstance(weight_format, CodebookFormat) else MSE()


def _round_to_searched_grid(
    weight: Tensor, weight_format: PackedFormat, importance: Tensor | None, *, grid: int, max_shrink: float
) -> WeightCodes:
    group_size = weight_format.group_size(weight.shape[1])
    if isinstance(weight_format, CodebookFormat):
        entries = weight_format.entries()
        scale, _, _ = ops.search_qparams(
            weight,
            importance,
            bits=weight_format.bits,
            symmetric=True,
            group_size=group_size,
            grid=grid,
            max_shrink=max_shrink,
            scale_dtype=weight_format.scale_dtype,
            codebook=entries,
        )
        codes = functional.quantize_codebook(weight, scale, entries, group_size=group_size)
        return WeightCodes(codes, scale, None, weight_format.table())
    per_tensor = weight_format.granularity == PerTensor()
    if per_tensor and importance is not None:
        importance = importance.expand(weight.shape).reshape(1, -1)
    scale, zero_point, _ = ops.search_qparams(
        weight.reshape(1, -1) if per_tensor else weight,
        importance,
        bits=weight_format.bits,
        symmetric=weight_format.symmetric,
        narrow_range=weight_format.narrow_range,
        group_size=None if per_tensor else group_size,
        grid=grid,
        max_shrink=max_shrink,
        scale_dtype=weight_format.scale_dtype,
    )
    if per_tensor:  # stored as one equal scale an output
        scale, zero_point = (q.expand(weight.shape[0], 1).contiguous() for q in (scale, zero_point))
    if weight_format.binary:
        return WeightCodes((weight >= 0).to(torch.uint8), scale, None)
    codes = ops.quantize(
        weight,
        scale.float(),
        zero_point,
        qmin=weight_format.qmin,
        qmax=weight_format.qmax,
        group_size=group_size,
    )
    return WeightCodes(codes, scale, None if weight_format.symmetric else zero_point.to(torch.uint8))
