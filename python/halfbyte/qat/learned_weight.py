"""Quantizers of weights whose scales are trained, and of ternary weights whose scale is their mean magnitude.

LSQ (arXiv:1902.08153) and LSQ+ (arXiv:2004.09576) for integers; SEQ (ParetoQ, arXiv:2502.02631) for codebooks such as
±1/4, ±3/4 and for ternary; binary weights with a scale (XNOR-Net, arXiv:1603.05279); absolute mean (BitNet b1.58,
arXiv:2402.17764). Where the papers disagree with what converges better here, `method="learned"` takes the latter.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from halfbyte import functional, ops
from halfbyte.algorithms import MSE
from halfbyte.errors import QuantizationError
from halfbyte.formats import CodebookFormat, IntFormat, PackedFormat, PerTensor
from halfbyte.nn.packed_weight import WeightCodes
from halfbyte.qat.functions import FakeQuantize, StraightThrough
from halfbyte.qat.learned import (
    LearnedAffine,
    LearnedCodebook,
    exponential_scale,
    positive_scale,
    zero_point_of_offset,
    zero_point_of_part,
)
from halfbyte.qat.quantizer_base import WeightQuantizer

LearnedMethod: TypeAlias = Literal["learned", "lsq", "lsq+", "seq", "binary"]
LEARNED_METHODS: tuple[str, ...] = get_args(LearnedMethod)


class LearnedWeight(WeightQuantizer):
    """A scale for each group, trained with the weights; asymmetric formats train their zero point, too.

    | method | formats | first scale | gradient |
    | --- | --- | --- | --- |
    | "learned" | all | smallest squared error | passes up to half a step past the last value |
    | "lsq" | integers | `2 mean|w| / sqrt(qmax)` | of the paper: passes where `w / scale` is in the range |
    | "lsq+" | integers | `max(|mean - 3 sd|, |mean + 3 sd|) / 2^(bits - 1)` | the same |
    | "seq" | codebooks, ternary | `max|w|` lies half a step past the last value | passes up to there |
    | "binary" | one bit | `mean|w|` | passes where `|w| <= scale` |

    The gradient of a scale is divided by `sqrt(n * steps)` for `n` weights that share it and the steps from the middle of the
    range to its end (LSQ). Parameters of "learned": `log_scale`, so that Adam's steps are relative to the scale, and
    `zero_part`, the part of an asymmetric range that lies below zero. Of the others, as published: `scale`, whose magnitude is
    the scale, and `offset`, the value of the lowest code.

    Args:
        weight_format: Format of the weight.
        shape: `(O, I)`.
        method: A row of the table; "learned" is "binary" with the smallest error for one bit.

    Raises:
        ValueError: the method does not fit the format.
    """

    scale: nn.Parameter | None
    offset: nn.Parameter | None
    log_scale: nn.Parameter | None
    zero_part: nn.Parameter | None

    def __init__(self, weight_format: PackedFormat, shape: tuple[int, int], method: LearnedMethod = "learned") -> None:
        super().__init__(weight_format, shape)
        fits = {
            "learned": True,
            "lsq": isinstance(weight_format, IntFormat) and not weight_format.binary,
            "lsq+": isinstance(weight_format, IntFormat) and not weight_format.binary,
            "seq": isinstance(weight_format, CodebookFormat) or _ternary(weight_format),
            "binary": weight_format.binary,
        }
        if not fits[method]:
            raise ValueError(f"weights={method!r} does not quantize to {weight_format}; use 'learned'")
        self.method = method
        self._group_size = None if weight_format.granularity == PerTensor() else weight_format.group_size(shape[1])
        self._groups = groups = (1, 1) if self._group_size is None else (shape[0], shape[1] // self._group_size)
        relative = method == "learned"
        self.scale = None if relative else nn.Parameter(torch.ones(groups))
        self.log_scale = nn.Parameter(torch.zeros(groups)) if relative else None
        self.offset = None if relative or weight_format.symmetric else nn.Parameter(torch.zeros(groups))
        self.zero_part = nn.Parameter(torch.zeros(groups)) if relative and not weight_format.symmetric else None
        elements = math.prod(shape) // math.prod(groups)
        # Steps from the middle of the range to its end: LSQ's Q_P.
        self._steps = (
            weight_format.qmax if isinstance(weight_format, IntFormat) else (len(weight_format.values) - 1) / 2
        )
        if not weight_format.symmetric:
            self._steps /= 2
        self.grad_factor = 1 / math.sqrt(elements * self._steps)

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """The first scales, as the method has them."""
        grouped = self._grouped(weight.detach().float())
        f, low = self.format, None
        if self.method == "learned":
            return self.load_codes(MSE(weighting="none").round(weight.detach(), f, None))
        if self.method == "binary":
            scale = grouped.abs().mean(-1)
        elif self.method == "seq":
            largest = grouped.abs().amax(-1)
            scale = largest / (_reach(f) if isinstance(f, CodebookFormat) else 1.5)
        elif self.method == "lsq":
            scale = 2 * grouped.abs().mean(-1) / math.sqrt(self._steps)
            low = grouped.mean(-1) - scale * self._steps
        else:
            mean, deviation = grouped.mean(-1), grouped.std(-1, correction=0)
            reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
            scale, low = reach / (1 << (f.bits - 1)), -reach
        zero_point = None if f.symmetric or low is None else torch.clamp(f.qmin - low / scale, f.qmin, f.qmax)
        self._set(scale, zero_point)

    @torch.no_grad()
    def load_codes(self, codes: WeightCodes) -> None:
        """Starts from qparams that were found otherwise, such as GPTQ's.

        Raises:
            QuantizationError: they are of another shape.
        """
        expected = (self.shape[0], self._groups[1])
        if codes.scale.shape != expected or (codes.zero_point is None) != self.format.symmetric:
            raise QuantizationError(
                f"codes have scales of shape {tuple(codes.scale.shape)}; {self.format} of a weight of shape "
                f"{tuple(self.shape)} needs {expected}, with zero points only where it is asymmetric"
            )
        rows = slice(0, self._groups[0])  # per tensor they repeat
        self._set(codes.scale[rows].float(), None if codes.zero_point is None else codes.zero_point[rows].float())

    def _set(self, scale: Tensor, zero_point: Tensor | None) -> None:
        qmin, qmax = self.format.qmin, self.format.qmax
        if self.scale is not None:
            self.scale.copy_(scale)
        if self.log_scale is not None:
            self.log_scale.copy_(torch.clamp(scale, min=torch.finfo(self.format.scale_dtype).tiny).log())
        if self.offset is not None and zero_point is not None:
            self.offset.copy_((qmin - zero_point) * scale)
        if self.zero_part is not None and zero_point is not None:
            self.zero_part.copy_((zero_point - qmin) / (qmax - qmin))

    def _qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, rounded as they are stored; differentiable."""
        f = self.format
        if self.log_scale is not None:
            scale = exponential_scale(self.log_scale, f.scale_dtype)
        else:
            assert self.scale is not None
            scale = positive_scale(self.scale, f.scale_dtype)
        if self.zero_part is not None:
            return scale, zero_point_of_part(self.zero_part, f.qmin, f.qmax)
        if self.offset is not None:
            return scale, zero_point_of_offset(self.offset, scale, f.qmin, f.qmax)
        return scale, torch.zeros_like(scale)

    def fake(self, weight: Tensor) -> FakeQuantize:
        """See `WeightQuantizer`."""
        f, (scale, zero_point) = self.format, self._qparams()
        if isinstance(f, CodebookFormat):
            clip = 0.99 * _reach(f) if self.method == "seq" else None
            return LearnedCodebook(scale, f.values, self._group_size or self.shape[1], clip, self.grad_factor)
        if f.binary:
            return LearnedCodebook(self._spread(scale), None, self._group_size or self.shape[1], None, self.grad_factor)
        return LearnedAffine(
            scale,
            zero_point,
            f.qmin,
            f.qmax,
            self._group_size,
            "lsq" if self.method in ("lsq", "lsq+") else "rounded",
            self.grad_factor,
        )

    @torch.no_grad()
    def codes(self, weight: Tensor) -> WeightCodes:
        """See `WeightQuantizer`."""
        f, weight = self.format, weight.detach()
        scale, zero_point = self._qparams()
        spread = self._spread(scale)
        stored = spread.to(f.scale_dtype)
        size = self._group_size or self.shape[1]
        if isinstance(f, CodebookFormat):
            codes = functional.quantize_codebook(weight, spread, f.entries(), group_size=size)
            return WeightCodes(codes, stored, None, f.table())
        if f.binary:
            return WeightCodes((weight >= 0).to(torch.uint8), stored, None)
        zero_point = self._spread(zero_point).to(torch.int32)
        codes = ops.quantize(weight, spread, zero_point, qmin=f.qmin, qmax=f.qmax, group_size=size)
        return WeightCodes(codes, stored, None if f.symmetric else zero_point.to(torch.uint8))

    def _grouped(self, weight: Tensor) -> Tensor:
        """`[groups of the scale, weights of each]`, in the scale's shape."""
        return weight.reshape(*self._groups, -1)

    def _spread(self, qparam: Tensor) -> Tensor:
        """`[O, G]`: per tensor, one for each output."""
        return qparam if self._group_size is not None else qparam.expand(self.shape[0], 1).contiguous()

    def extra_repr(self) -> str:
        """Format and method, for `print(model)`."""
        return f"{self.format}, {self.method}"


class AbsoluteMeanWeight(WeightQuantizer):
    """Ternary weights whose scale is the mean magnitude of the weights that share it, at every step.

    The gradient passes straight through everywhere, as in BitNet b1.58; nothing is trained beside the weights.

    Args:
        weight_format: Ternary.
        shape: `(O, I)`.

    Raises:
        ValueError: another format.
    """

    def __init__(self, weight_format: PackedFormat, shape: tuple[int, int]) -> None:
        super().__init__(weight_format, shape)
        if not _ternary(weight_format):
            raise ValueError(f"weights='absmean' is for ternary weights, not for {weight_format}; use 'learned'")

    @torch.no_grad()
    def codes(self, weight: Tensor) -> WeightCodes:
        """See `WeightQuantizer`."""
        weight, f = weight.detach(), self.format
        size = f.group_size(self.shape[1])
        if f.granularity == PerTensor():
            mean = weight.float().abs().mean().expand(self.shape[0], 1).contiguous()
        else:
            mean = weight.float().abs().reshape(self.shape[0], -1, size).mean(-1)
        scale = positive_scale(mean, f.scale_dtype)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        codes = ops.quantize(weight, scale, zero_point, qmin=-1, qmax=1, group_size=size)
        return WeightCodes(codes, scale.to(f.scale_dtype), None)

    def fake(self, weight: Tensor) -> FakeQuantize:
        """See `WeightQuantizer`."""
        size = self.format.group_size(self.shape[1])
        return StraightThrough(lambda w: self.codes(w).dequantize(size).to(w.dtype))


def _ternary(weight_format: PackedFormat) -> bool:
    return isinstance(weight_format, IntFormat) and weight_format.bits == 2 and weight_format.narrow_range


def _reach(codebook: CodebookFormat) -> float:
    """Half a step past the last value."""
    return 1.5 * codebook.values[-1] - 0.5 * codebook.values[-2]
