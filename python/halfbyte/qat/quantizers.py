"""Quantizers of weights and of activations: where the scales of fake quantization come from during training."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.algorithms import MSE, RTN, Rounding, default_rounding
from halfbyte.formats import CodebookFormat, FloatFormat, IntFormat, PackedFormat, PerTensor
from halfbyte.nn.packed_weight import WeightCodes
from halfbyte.observers.observer import qparams_of_range
from halfbyte.qat.affine import Affine
from halfbyte.qat.functions import FakeQuantize, StraightThrough
from halfbyte.qat.learned_activation import LearnedActivation, PactActivation
from halfbyte.qat.learned_weight import LEARNED_METHODS, AbsoluteMeanWeight, LearnedMethod, LearnedWeight
from halfbyte.qat.quantizer_base import (
    StaticActivation,
    WeightQuantizer,
    all_reduced_range,
    recomputing,
    shares_ranges,
)
from halfbyte.qat.switches import Switches

_TINY = torch.finfo(torch.float32).tiny


class RoundedWeight(WeightQuantizer):
    """Scales computed from the weight at every step, as a rounding of PTQ does: min/max or the smallest squared error.

    Args:
        weight_format: Format of the weight.
        shape: `(O, I)`.
        rounding: What chooses the scales.
    """

    def __init__(self, weight_format: PackedFormat, shape: tuple[int, int], rounding: Rounding) -> None:
        super().__init__(weight_format, shape)
        self._rounding = rounding

    @torch.no_grad()
    def codes(self, weight: Tensor) -> WeightCodes:
        """See `WeightQuantizer`."""
        return self._rounding.round(weight.detach(), self.format, None)

    def fake(self, weight: Tensor) -> FakeQuantize:
        """See `WeightQuantizer`."""
        group_size = self.format.group_size(self.shape[1])
        with torch.no_grad():
            if isinstance(self.format, CodebookFormat) or self.format.binary:
                return StraightThrough(lambda w: self.codes(w).dequantize(group_size).to(w.dtype))
            grid = self._rounding.grid if isinstance(self._rounding, MSE) else 1
            per_tensor = self.format.granularity == PerTensor()
            flat = weight.detach().reshape(1, -1) if per_tensor else weight.detach()
            scale, zero_point, _ = ops.search_qparams(
                flat,
                bits=self.format.bits,
                symmetric=self.format.symmetric,
                narrow_range=self.format.narrow_range,
                group_size=None if per_tensor else group_size,
                grid=grid,
                scale_dtype=self.format.scale_dtype,
            )
        if per_tensor:
            return Affine(scale.float(), zero_point, self.format.qmin, self.format.qmax)
        return Affine(scale.float(), zero_point, self.format.qmin, self.format.qmax, group_size=group_size)

    def extra_repr(self) -> str:
        """Format and rounding, for `print(model)`."""
        return f"{self.format}, {type(self._rounding).__name__}"


class HalfWeight(WeightQuantizer):
    """A weight cast to bfloat16 or float16."""

    def __init__(self, weight_format: FloatFormat, shape: tuple[int, int]) -> None:
        nn.Module.__init__(self)
        self.shape, self.dtype = shape, weight_format.dtype

    def fake(self, weight: Tensor) -> FakeQuantize:
        """See `WeightQuantizer`."""
        return StraightThrough(lambda w: w.to(self.dtype).to(w.dtype))

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return str(self.dtype)


def weight_quantizer(
    weight_format: PackedFormat | FloatFormat, shape: tuple[int, int], method: str = "auto"
) -> WeightQuantizer:
    """The quantizer of a weight.

    Args:
        weight_format: Format of the weight.
        shape: `(O, I)` of its matrix.
        method: "minmax" or "mse", computed from the weight at each step; "auto" is what PTQ does: min/max at 8 bits and for
            codebooks, MSE below. "absmean", computed as well, for ternary. Trained with the weights: "learned", and as
            published "lsq", "lsq+", "seq" and "binary"; see `qat.LearnedWeight`.

    Raises:
        ValueError: an unknown method, or one that does not fit the format.
    """
    if isinstance(weight_format, FloatFormat):
        return HalfWeight(weight_format, shape)
    roundings: dict[str, Rounding] = {
        "minmax": RTN(),
        "mse": MSE(grid=32),
        "auto": default_rounding(weight_format),
    }
    if method in LEARNED_METHODS:
        return LearnedWeight(weight_format, shape, cast(LearnedMethod, method))
    if method == "absmean":
        return AbsoluteMeanWeight(weight_format, shape)
    if method not in roundings:
        known = (*roundings, *LEARNED_METHODS, "absmean")
        raise ValueError(f"weights={method!r} is unknown; use {', '.join(map(repr, known))}")
    return RoundedWeight(weight_format, shape, roundings[method])


class DynamicActivation(nn.Module):
    """A scale for each token (for a convolution: each sample), found as it comes: `absmax / qmax`.

    Asymmetric formats have a zero point for each token too, and their codes cover its range.

    Args:
        activation_format: Format per token.
        per_sample: For convolutions.
    """

    ready = True

    def __init__(self, activation_format: IntFormat, *, per_sample: bool) -> None:
        super().__init__()
        self.format, self._per_sample = activation_format, per_sample

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        with torch.no_grad():
            flat = x.detach().flatten(1) if self._per_sample else x.detach()
            low, high = ops.observe_minmax(flat, group_size=flat.shape[-1])
            if self.format.symmetric:
                scale = torch.clamp(torch.maximum(-low, high) / self.format.qmax, min=_TINY)
                zero_point = torch.zeros_like(scale, dtype=torch.int32)
            else:
                low, high = low.clamp(max=0), high.clamp(min=0)
                scale = torch.clamp((high - low) / self.format.qmax, min=_TINY)
                zero_point = -torch.round(low * (1 / scale)).to(torch.int32)
        qmin, qmax = self.format.qmin, self.format.qmax
        group_size = None if self._per_sample else x.shape[-1]
        return Affine(scale, zero_point, qmin, qmax, group_size=group_size, per_sample=self._per_sample)

    def qparams(self) -> None:
        """None: there are no fixed ones."""

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return str(self.format)


class MovingAverageActivation(StaticActivation, Switches):
    """One range for all inputs: an exponential moving average of each batch's extremes.

    What `hb.observers.MovingAverageMinMax` computes, in buffers, so that checkpoints hold it. Batches with NaN or inf do not
    count. Between processes of a `torch.distributed` group every batch's extremes are shared.

    Args:
        activation_format: Format per tensor.
        name: What error messages call the tensor.
        momentum: What the newest batch counts; the first counts fully.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, activation_format: IntFormat, *, name: str, momentum: float = 0.01) -> None:
        super().__init__(observing=True)
        self.format, self.name, self.momentum = activation_format, name, momentum
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        if self.training and self.on("observing") and not recomputing() and (x.numel() or shares_ranges()):
            self._observe(x.detach())
        scale, zero_point = self._current()
        return Affine(scale, zero_point, self.format.qmin, self.format.qmax)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = all_reduced_range(x)
        usable = torch.isfinite(low) & torch.isfinite(high)
        # A range of zeros alone, such as that of an initial state, counts until something else comes.
        part = torch.where(self.high > self.low, self.momentum, 1.0)
        for buffer, end in ((self.low, low), (self.high, high)):  # of a model in half precision, so are the buffers
            buffer.copy_(torch.where(usable, torch.lerp(buffer.float(), end, part), buffer))
        self.batches.add_(usable)

    @torch.no_grad()
    def _current(self) -> tuple[Tensor, Tensor]:
        f = self.format
        low, high = self.low.float(), self.high.float()
        return qparams_of_range(low, high, qmin=f.qmin, qmax=f.qmax, symmetric=f.symmetric)

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return f"{self.format}, momentum={self.momentum}"


def activation_quantizer(
    activation_format: IntFormat, method: str = "auto", *, name: str = "x", per_sample: bool = False
) -> nn.Module:
    """The quantizer of an input: an `ActivationQuantizer`.

    Args:
        activation_format: Per token or per tensor.
        method: For static activations: "moving_average" (also "auto"), or trained, "learned", and as published "lsq" (LSQ+
            where the format is asymmetric) and "pact"; see `qat.LearnedActivation`.
        name: What error messages call the tensor.
        per_sample: The input of a convolution.

    Raises:
        ValueError: an unknown method, or one that does not fit the format.
    """
    if method not in ("auto", "moving_average", "learned", "lsq", "pact"):
        raise ValueError(f"activations={method!r} is unknown; use 'auto', 'moving_average', 'learned', 'lsq' or 'pact'")
    if activation_format.granularity != PerTensor():
        return DynamicActivation(activation_format, per_sample=per_sample)
    if method in ("learned", "lsq"):
        return LearnedActivation(activation_format, name=name, method=cast(Literal["learned", "lsq"], method))
    if method == "pact":
        return PactActivation(activation_format, name=name)
    return MovingAverageActivation(activation_format, name=name)
