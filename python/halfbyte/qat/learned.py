"""Fake quantization whose scale is trained: one application of it, and scales that stay positive whatever an optimizer does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from halfbyte import ops
from halfbyte.ops import Estimator
from halfbyte.qat.affine import MemoryOrder
from halfbyte.qat.functions import Gradients, Pullback


@dataclass(frozen=True, slots=True, eq=False)
class LearnedAffine:
    """`ops.fake_quantize_learned`.

    Args:
        scale, zero_point, qmin, qmax, group_size, estimator, grad_factor: As for `ops.fake_quantize_learned`.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    group_size: int | None = None
    estimator: Estimator = "rounded"
    grad_factor: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Scale and zero point."""
        return self.scale, self.zero_point

    def _apply(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ops.fake_quantize_learned(
            x,
            scale,
            zero_point,
            qmin=self.qmin,
            qmax=self.qmax,
            group_size=self.group_size,
            estimator=self.estimator,
            grad_factor=self.grad_factor,
        )

    @torch.no_grad()
    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size)
        return memory.restore(self._apply(memory.view(x), *tensors))

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size)
        dense = memory.view(x.detach())

        def pullback(grad: Tensor) -> Gradients:
            of_x, *of_qparams = ops.fake_quantize_learned_gradients(
                memory.view(grad),
                dense,
                *tensors,
                qmin=self.qmin,
                qmax=self.qmax,
                group_size=self.group_size,
                estimator=self.estimator,
                grad_factor=self.grad_factor,
            )
            return memory.restore(of_x), *of_qparams

        with torch.no_grad():
            return memory.restore(self._apply(dense, *tensors)), pullback

    def __call__(self, x: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size)
        return memory.restore(self._apply(memory.view(x), self.scale, self.zero_point))


@dataclass(frozen=True, slots=True, eq=False)
class LearnedCodebook:
    """`ops.fake_quantize_codebook`, or `ops.fake_quantize_binary` without values.

    Args:
        scale, values, group_size, clip, grad_factor: As for `ops.fake_quantize_codebook`.
    """

    scale: Tensor
    values: Sequence[float] | None
    group_size: int
    clip: float | None
    grad_factor: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The scale."""
        return (self.scale,)

    def _apply(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.values is None:
            return ops.fake_quantize_binary(
                x, scale, group_size=self.group_size, clip=self.clip or 1.0, grad_factor=self.grad_factor
            )
        return ops.fake_quantize_codebook(
            x, scale, self.values, group_size=self.group_size, clip=self.clip, grad_factor=self.grad_factor
        )

    @torch.no_grad()
    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        return self._apply(x, *tensors)

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """See `FakeQuantize`."""
        x = x.detach()

        def pullback(grad: Tensor) -> Gradients:
            if self.values is None:
                return ops.fake_quantize_binary_gradients(
                    grad, x, tensors[0], group_size=self.group_size, clip=self.clip or 1.0, grad_factor=self.grad_factor
                )
            return ops.fake_quantize_codebook_gradients(
                grad,
                x,
                tensors[0],
                self.values,
                group_size=self.group_size,
                clip=self.clip,
                grad_factor=self.grad_factor,
            )

        return self.quantize(x, *tensors), pullback

    def __call__(self, x: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        return self._apply(x, self.scale)


def positive_scale(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale that a trained number stands for: its magnitude, as `dtype` stores it, in float32; differentiable.

    At least the smallest normal number of `dtype` and at most 2^60 (float16: 65,504), also of 0, of infinity and of NaN.
    A step that takes the number past zero makes a small scale, not a negative one. Gradients that are not finite count as 0,
    and none is larger than 2^40, so that no optimizer makes NaN of the number.

    Args:
        parameter: Any shape; float32.
        dtype: What the scale is stored in.

    Example:
        >>> positive_scale(torch.tensor([0.1, -0.25, 0.0, float("nan")]))
        tensor([1.0000e-01, 2.5000e-01, 1.1755e-38, 1.1755e-38])
    """
    scale: Tensor = _Scale.apply(parameter, dtype, False)  # type: ignore[no-untyped-call]
    return scale


def exponential_scale(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale whose natural logarithm a trained number is; bounds and gradients as of `positive_scale`.

    A step of an optimizer such as Adam changes it by the learning rate's part of it, however small or large it is.

    Args:
        parameter: Any shape; float32.
        dtype: What the scale is stored in.

    Example:
        >>> exponential_scale(torch.tensor([0.0, -1.0, float("nan")]))
        tensor([1.0000e+00, 3.6788e-01, 1.1755e-38])
    """
    scale: Tensor = _Scale.apply(parameter, dtype, True)  # type: ignore[no-untyped-call]
    return scale


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, parameter: Tensor, dtype: torch.dtype, logarithm: bool) -> Tensor:
        number = parameter.detach().float()
        smallest, largest = torch.finfo(dtype).tiny, 65504.0 if dtype is torch.float16 else 2.0**60
        magnitude = number.exp() if logarithm else number.abs()
        magnitude = torch.nan_to_num(magnitude, nan=smallest, posinf=largest)
        scale = torch.clamp(magnitude, smallest, largest).to(dtype).float()
        ctx.save_for_backward(scale if logarithm else torch.where(number < 0, -1.0, 1.0))
        return scale

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
        return bounded_gradient(grad * derivative), None, None


def bounded_gradient(grad: Tensor) -> Tensor:
    """0 for what is not finite, else limited to ±2^40."""
    largest = 2.0**40  # not a global: in graphs of any size those are symbols, which autograd functions cannot take
    return torch.clamp(torch.nan_to_num(grad, 0.0, 0.0, 0.0), -largest, largest)


def zero_point_of_offset(offset: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The zero point, not yet rounded, at which code `qmin` of a range that begins at `offset` lies; differentiable.

    LSQ+ trains the offset, in units of the tensor: `zero_point = qmin - offset / scale`.
    """
    zero_point: Tensor = _ZeroPoint.apply(offset, scale, qmin, qmax)  # type: ignore[no-untyped-call]
    return zero_point


class _ZeroPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, offset: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        ratio = torch.nan_to_num(offset.detach() / scale.detach(), 0.0)
        ctx.save_for_backward(scale.detach(), torch.clamp(ratio, qmin - qmax, 0))
        return torch.clamp(torch.round(qmin - ratio), qmin, qmax)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scale, ratio = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
        of_offset = -grad / scale
        return bounded_gradient(of_offset), -of_offset * ratio, None, None


def zero_point_of_part(part: Tensor, qmin: int, qmax: int) -> Tensor:
    """The zero point, rounded, of a range of which `part`, 0 to 1, lies below zero; the gradient passes straight through."""
    zero_point: Tensor = _Part.apply(part, qmin, qmax)  # type: ignore[no-untyped-call]
    return zero_point


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.codes = qmax - qmin  # type: ignore[attr-defined]  # a context takes any attribute
        return torch.round(torch.clamp(torch.nan_to_num(part.detach().float(), 0.0), 0.0, 1.0) * (qmax - qmin)) + qmin

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        codes: int = ctx.codes  # type: ignore[attr-defined]
        return bounded_gradient(grad * codes), None, None
