"""Quantizers of layers' inputs whose range is trained: one of our own, LSQ, LSQ+ and PACT.

LSQ (arXiv:1902.08153) trains the scale of symmetric formats, LSQ+ (arXiv:2004.09576) where the range of asymmetric ones begins
as well, PACT (arXiv:1805.06085) where positive activations are cut off.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from halfbyte import functional, ops
from halfbyte.formats import IntFormat
from halfbyte.observers.observer import qparams_of_range
from halfbyte.qat.functions import FakeQuantize
from halfbyte.qat.learned import (
    LearnedAffine,
    exponential_scale,
    positive_scale,
    zero_point_of_offset,
    zero_point_of_part,
)
from halfbyte.qat.quantizer_base import (
    StaticActivation,
    all_reduced_mean,
    all_reduced_range,
    recomputing,
    shares_ranges,
)

_SAMPLE = 1 << 14  # elements at least, of the first batch
_PARTS = 40


class LearnedActivation(StaticActivation, nn.Module):
    """One trained scale for all inputs and, of asymmetric formats, a trained zero point.

    "learned": `log_scale`, so that Adam's steps are relative to the scale, and `zero_part`, the part of the range below zero.
    The first batch gives the range with the smallest squared error. The gradient passes up to half a step past the ends.

    "lsq": LSQ, and LSQ+ of asymmetric formats, as published: `scale`, whose magnitude is the scale, and `offset`, the value of
    the lowest code. Symmetric formats begin with `2 mean|x| / sqrt(qmax)`, asymmetric ones with the first batch's extremes.
    The gradient passes where `x / scale` is in the range.

    Between processes of a `torch.distributed` group the first range is that of all their first batches. Gradients of scales are
    divided by `sqrt(n * steps)` for `n` elements of a sample and the steps from the middle of the range to its end (LSQ).

    Args:
        activation_format: Format per tensor.
        name: What error messages call the tensor.
        method: "learned" or "lsq".
    """

    batches: Tensor

    def __init__(
        self, activation_format: IntFormat, *, name: str, method: Literal["learned", "lsq"] = "learned"
    ) -> None:
        super().__init__()
        self.format, self.name, self.method = activation_format, name, method
        relative, asymmetric = method == "learned", not activation_format.symmetric
        self.scale = None if relative else nn.Parameter(torch.ones(()))
        self.log_scale = nn.Parameter(torch.zeros(())) if relative else None
        self.offset = nn.Parameter(torch.zeros(())) if asymmetric and not relative else None
        self.zero_part = nn.Parameter(torch.zeros(())) if asymmetric and relative else None
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))  # 0 or 1: whether the first was seen

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        first = torch.compiler.is_compiling() or not self.batches
        if self.training and first and not recomputing() and (x.numel() or shares_ranges()):
            self._initialize(x.detach())
        f = self.format
        scale, zero_point = self._current()
        steps = f.qmax if f.symmetric else f.qmax / 2
        grad_factor = 1 / math.sqrt(max(x.numel() // max(x.shape[0], 1), 1) * steps)
        estimator: ops.Estimator = "rounded" if self.method == "learned" else "lsq"
        return LearnedAffine(scale, zero_point, f.qmin, f.qmax, None, estimator, grad_factor)

    def _current(self) -> tuple[Tensor, Tensor]:
        f = self.format
        if self.log_scale is not None:
            scale = exponential_scale(self.log_scale)
        else:
            assert self.scale is not None
            scale = positive_scale(self.scale)
        if self.zero_part is not None:
            return scale, zero_point_of_part(self.zero_part, f.qmin, f.qmax)
        if self.offset is not None:
            return scale, zero_point_of_offset(self.offset, scale, f.qmin, f.qmax)
        return scale, torch.zeros_like(scale)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        scale, low = self._first_range(x.float())
        usable = (self.batches == 0) & torch.isfinite(scale) & torch.isfinite(low) & (scale > 0)
        first = {
            "scale": scale,
            "log_scale": torch.log(scale),
            "offset": low,
            "zero_part": -low / (scale * (self.format.qmax - self.format.qmin)),
        }
        for name, parameter in self.named_parameters(recurse=False):
            parameter.copy_(torch.where(usable, first[name], parameter))
        self.batches.copy_(torch.where(usable, 1, self.batches))

    def _first_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, and the value of the lowest code of an asymmetric range, which holds zero."""
        f = self.format
        if f.symmetric and self.method == "lsq":
            mean = all_reduced_mean(x.abs().mean(), x)
            return 2 * mean / math.sqrt(f.qmax), torch.zeros_like(mean)
        low, high = all_reduced_range(x)
        if self.method == "learned":
            low, high = _clipped(x, low, high, f)
        low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
        if f.symmetric:
            return torch.maximum(-low, high) / f.qmax, torch.zeros_like(low)
        return (high - low) / (f.qmax - f.qmin), low

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return f"{self.format}, {self.method}"


class PactActivation(LearnedActivation):
    """Inputs cut off at a trained value: `clip(x, 0, alpha)`, in steps of `alpha / qmax`.

    `scale`, the parameter, is `alpha`, which learns from what is cut off alone; the paper adds L2 regularisation of it to the
    loss. The first batch's largest value is the first one. Negative inputs become 0: for what follows a ReLU.

    Args:
        activation_format: Asymmetric, per tensor.
        name: What error messages call the tensor.

    Raises:
        ValueError: a symmetric format.
    """

    def __init__(self, activation_format: IntFormat, *, name: str) -> None:
        if activation_format.symmetric:
            raise ValueError(
                f"activations='pact' is for asymmetric formats, of inputs that are not negative, not for {activation_format}; "
                "use 'learned'"
            )
        super().__init__(activation_format, name=name, method="lsq")
        self.offset = None

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        fake = super().fake(x)
        assert isinstance(fake, LearnedAffine)
        return LearnedAffine(fake.scale, fake.zero_point, fake.qmin, fake.qmax, None, "pact")

    def _current(self) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        scale = positive_scale(self.scale) / self.format.qmax
        return scale, torch.zeros_like(scale)

    def _first_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, high = all_reduced_range(x)
        return high, torch.zeros_like(high)

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return f"{self.format}, PACT"


def _clipped(x: Tensor, low: Tensor, high: Tensor, f: IntFormat) -> tuple[Tensor, Tensor]:
    """The part of the range, of forty, that a sample of x is rounded on with the smallest squared error."""
    sample = x.reshape(-1)[:: max(1, x.numel() // _SAMPLE)]
    parts = torch.linspace(1 / _PARTS, 1, _PARTS)
    scale, zero_point = qparams_of_range(low * parts, high * parts, qmin=f.qmin, qmax=f.qmax, symmetric=f.symmetric)
    options = {"qmin": f.qmin, "qmax": f.qmax, "axis": 0}
    rounded = functional.fake_quantize(sample.expand(_PARTS, -1), scale, zero_point, **options)
    at = all_reduced_mean((rounded - sample).square().mean(1), x).argmin(0, keepdim=True)
    best = parts.gather(0, at).squeeze(0)  # a compiled graph cannot index by what it computes
    return low * best, high * best
