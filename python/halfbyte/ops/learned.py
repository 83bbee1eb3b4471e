"""Fake-quantize whose scale and zero point are trained with the weights.

LSQ (arXiv:1902.08153) learns the scale, LSQ+ (arXiv:2004.09576) the zero point as well. All three gradients come from one
pass over `x` and the upstream gradient; nothing but `x` is saved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from halfbyte import _extension  # registers torch.ops.halfbyte
from halfbyte.ops.checks import check_float, check_range, qparams_shape

__all__ = ["fake_quantize_learned"]

_extension.check_extension()

_fake_quantize_learned = torch.ops.halfbyte.fake_quantize_learned.default
_fake_quantize_learned_backward = torch.ops.halfbyte.fake_quantize_learned_backward.default


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    grad_factor: float = 1.0,
) -> Tensor:
    """Rounds `x` to the values that its quantized form can hold; differentiable in `x`, `scale` and `zero_point`.

    The value is that of `fake_quantize` with `clamp(round(zero_point), qmin, qmax)`. With `v = x / scale` and
    `code = clamp(round(v) + zero_point, qmin, qmax) - zero_point`, where the code is not clamped the gradients are 1 for `x`,
    `grad_factor * (code - v)` for `scale` and 0 for `zero_point`; where it is clamped they are 0, `grad_factor * code` and
    `-grad_factor * scale`. This is what PyTorch's `_fake_quantize_learnable_per_tensor_affine` and
    `..._per_channel_affine` compute, but for what they round otherwise than their forward: a negative zero point, and
    `round(v + zero_point)` at ties. Sums are equal bit for bit for any number of threads.

    Args:
        x: Any shape; float32, bfloat16 or float16. NaN gives NaN in the gradient of `scale`.
        scale: Positive; the shape that the granularity asks for. Computed with in float32.
        zero_point: Floating point, of the same shape; zeros that need no gradient for a symmetric format.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension whose indices have their own scale.
        group_size: Elements of the last dimension that share a scale.
        grad_factor: Factor of the gradients of `scale` and `zero_point`; LSQ's is `1 / sqrt(n * qmax)` for `n` elements
            that share a scale.

    Returns:
        Contiguous tensor of the shape and dtype of `x`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes, ranges or granularity do not fit.
        RuntimeError: `zero_point` holds NaN, or a second derivative is asked for.

    Example:
        >>> import torch, halfbyte as hb
        >>> x = torch.tensor([0.12, -0.9, 3.0])
        >>> scale = torch.tensor(0.1, requires_grad=True)
        >>> y = hb.ops.fake_quantize_learned(x, scale, torch.tensor(0.0), qmin=-8, qmax=7)
        >>> y.sum().backward()
        >>> scale.grad  # (1 - 1.2) - 8 + 7
        tensor(-1.2000)
    """
    check_float(x, "x")
    check_range(qmin, qmax)
    if not math.isfinite(grad_factor):
        raise ValueError(f"grad_factor={grad_factor} is not finite")
    shape = qparams_shape(x, axis, group_size, "x")
    scale = _check_qparam(x, scale, "scale", shape, axis, group_size)
    zero_point = _check_qparam(x, zero_point, "zero_point", shape, axis, group_size)
    arguments = (x, scale, zero_point, qmin, qmax, axis, group_size, grad_factor)
    trains = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or zero_point.requires_grad)
    function = _Learned.apply if trains and not torch.compiler.is_compiling() else _fake_quantize_learned
    y: Tensor = function(*arguments)  # type: ignore[no-untyped-call]
    return y


def _check_qparam(
    x: Tensor, qparam: Tensor, name: str, shape: tuple[int, ...] | None, axis: int | None, group_size: int | None
) -> Tensor:
    """The qparam in float32, of the shape that the granularity needs."""
    check_float(qparam, name)
    if qparam.shape != shape if shape is not None else qparam.numel() != 1:
        expected = f"the shape {tuple(shape)}" if shape is not None else "one element"
        raise ValueError(
            f"{name} has shape {tuple(qparam.shape)}; x of shape {tuple(x.shape)} with axis={axis}, "
            f"group_size={group_size} needs {expected}"
        )
    return qparam.float()


# Fake kernels: shapes and dtypes of the results, contiguous like the real ones.


def _fake_quantize_learned_fake(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_quantize_learned_backward_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


torch.library.register_fake("halfbyte::fake_quantize_learned", _fake_quantize_learned_fake)
torch.library.register_fake("halfbyte::fake_quantize_learned_backward", _fake_quantize_learned_backward_fake)


def _save_inputs(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, scale, zero_point, *options = inputs
    ctx.save_for_backward(x, scale, zero_point)  # type: ignore[arg-type]  # inputs are typed as objects
    ctx.options = options  # type: ignore[attr-defined]  # a context takes any attribute


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
    gradients = _fake_quantize_learned_backward(grad, *saved, *ctx.options)  # type: ignore[attr-defined]
    return (*gradients, None, None, None, None, None)


def _no_double_backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "fake_quantize_learned has no second derivative: its gradient is the straight-through estimator; "
        "do not differentiate through a backward pass (create_graph=True) that contains it"
    )


torch.library.register_autograd("halfbyte::fake_quantize_learned", _gradients, setup_context=_save_inputs)
torch.library.register_autograd("halfbyte::fake_quantize_learned_backward", _no_double_backward)


class _Learned(torch.autograd.Function):
    """The same for eager mode, past the dispatcher's Python autograd kernels, which take many times longer a call."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _fake_quantize_learned(*args)
        _save_inputs(ctx, args, y)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses a second derivative
            return _gradients(ctx, grad)
        with torch._C._AutoDispatchBelowAutograd():
            return _gradients(ctx, grad)
