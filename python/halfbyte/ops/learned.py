"""Fake-quantize whose scale and zero point are trained with the weights.

LSQ (arXiv:1902.08153) learns the scale, LSQ+ (arXiv:2004.09576) the zero point as well, PACT (arXiv:1805.06085) where
activations are cut off. All three gradients come from one pass over `x` and the upstream gradient; nothing but `x` is saved.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from halfbyte import _extension  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import with_gradients
from halfbyte.ops.checks import check_float, check_gradient, check_range, qparams_shape

__all__ = ["Estimator", "fake_quantize_learned", "fake_quantize_learned_gradients"]

Estimator: TypeAlias = Literal["rounded", "lsq", "pact"]
_ESTIMATORS: tuple[str, ...] = get_args(Estimator)  # in the order of Estimator in training.h

_extension.check_extension()

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
    estimator: Estimator = "rounded",
    grad_factor: float = 1.0,
) -> Tensor:
    """Rounds `x` to the values that its quantized form can hold; differentiable in `x`, `scale` and `zero_point`.

    The value is that of `fake_quantize` with `clamp(round(zero_point), qmin, qmax)`. With `v = x / scale` and
    `code = clamp(round(v) + zero_point, qmin, qmax) - zero_point`, where the code is not clamped the gradients are 1 for `x`,
    `grad_factor * (code - v)` for `scale` and 0 for `zero_point`; where it is clamped they are 0, `grad_factor * code` and
    `-grad_factor * scale`. This is what PyTorch's `_fake_quantize_learnable_per_tensor_affine` and
    `..._per_channel_affine` compute, but for what they round otherwise than their forward: a negative zero point, and
    `round(v + zero_point)` at ties. Sums are equal bit for bit for any number of threads.

    The papers clamp before they round, so what lies within half a step past either end counts as clamped for them:
    `estimator="lsq"` gives the gradients of LSQ and LSQ+ as published, "pact" those of PACT, whose scale learns from what is
    clamped alone (its clipping value is `qmax * scale`).

    Args:
        x: Any shape; float32, bfloat16 or float16. NaN gives NaN in the gradient of `scale`.
        scale: Positive; the shape that the granularity asks for. Computed with in float32.
        zero_point: Floating point, of the same shape; zeros that need no gradient for a symmetric format.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension whose indices have their own scale.
        group_size: Elements of the last dimension that share a scale.
        estimator: "rounded" clamps codes; "lsq" and "pact" clamp `v` where `qmin - zero_point < v < qmax - zero_point` fails.
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
    arguments = _arguments(x, scale, zero_point, qmin, qmax, axis, group_size, estimator, grad_factor)
    return _fake_quantize_learned(*arguments)


def fake_quantize_learned_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
    estimator: Estimator = "rounded",
    grad_factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `fake_quantize_learned`, for functions of one's own that save less than autograd would.

    Args:
        grad: Gradient of the result, of the shape and dtype of `x`.
        x, scale, zero_point, qmin, qmax, axis, group_size, estimator, grad_factor: As for `fake_quantize_learned`.

    Returns:
        Gradients of `x`, in its dtype, and of `scale` and `zero_point`, in float32.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes, ranges or granularity do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> x, one = torch.tensor([0.12, -0.9, 3.0]), torch.ones(3)
        >>> hb.ops.fake_quantize_learned_gradients(one, x, torch.tensor(0.1), torch.tensor(0.0), qmin=-8, qmax=7)
        (tensor([1., 0., 0.]), tensor(-1.2000), tensor(-0.2000))
    """
    check_gradient(grad, x)
    arguments = _arguments(x, scale, zero_point, qmin, qmax, axis, group_size, estimator, grad_factor)
    gradients: tuple[Tensor, Tensor, Tensor] = _fake_quantize_learned_backward(grad, *arguments)
    return gradients


def _arguments(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    estimator: Estimator,
    grad_factor: float,
) -> tuple[object, ...]:
    """What the C++ operators get, checked."""
    check_float(x, "x")
    check_range(qmin, qmax)
    if not torch.compiler.is_compiling() and not math.isfinite(grad_factor):
        raise ValueError(f"grad_factor={grad_factor} is not finite")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator={estimator!r} is unknown; use one of {', '.join(map(repr, _ESTIMATORS))}")
    shape = qparams_shape(x, axis, group_size, "x")
    scale = _check_qparam(x, scale, "scale", shape, axis, group_size)
    zero_point = _check_qparam(x, zero_point, "zero_point", shape, axis, group_size)
    return x, scale, zero_point, qmin, qmax, axis, group_size, _ESTIMATORS.index(estimator), grad_factor


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
    estimator: int,
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
    estimator: int,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


torch.library.register_fake("halfbyte::fake_quantize_learned", _fake_quantize_learned_fake)
torch.library.register_fake("halfbyte::fake_quantize_learned_backward", _fake_quantize_learned_backward_fake)
_fake_quantize_learned = with_gradients("fake_quantize_learned", saved=3)
