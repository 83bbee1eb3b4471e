"""Fake-quantize to a codebook, with a scale that is trained: SEQ's two bits, NF4, ternary, binary.

SEQ (ParetoQ, arXiv:2502.02631) at 2 bits is the codebook ±1/4, ±3/4 with `clip=0.99`. Both gradients come from one pass over
`x` and the upstream gradient; nothing but `x` is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from halfbyte import _extension  # registers torch.ops.halfbyte
from halfbyte.formats import CODEBOOK_ENTRIES
from halfbyte.ops.autograd import with_gradients
from halfbyte.ops.checks import check_float, check_gradient, qparams_shape

__all__ = [
    "fake_quantize_binary",
    "fake_quantize_binary_gradients",
    "fake_quantize_codebook",
    "fake_quantize_codebook_gradients",
]

_extension.check_extension()

_fake_quantize_codebook_backward = torch.ops.halfbyte.fake_quantize_codebook_backward.default


def fake_quantize_codebook(
    x: Tensor,
    scale: Tensor,
    values: Sequence[float],
    *,
    group_size: int,
    clip: float | None = None,
    grad_factor: float = 1.0,
) -> Tensor:
    """Rounds `x` to the nearest of `scale * values`; differentiable in `x` and `scale`.

    With `v = x / scale`, `entry` the value nearest to it (the lower one half way between two) and `inside = |v| <= clip`, the
    gradients are 1 for `x` and `grad_factor * (entry - v)` for `scale` inside, 0 and `grad_factor * entry` outside. Sums are
    equal bit for bit for any number of threads.

    Args:
        x: `[..., I]`; float32, bfloat16 or float16. NaN stays NaN, and gives NaN in the gradient of its scale.
        scale: `[..., I / group_size]`, positive. Computed with in float32.
        values: 2 to 16 finite numbers in increasing order, such as `CodebookFormat.values`.
        group_size: Elements of the last dimension that share a scale.
        clip: Largest `|v|` whose gradient passes; None: half a step past the first and the last value.
        grad_factor: Factor of the gradient of `scale`.

    Returns:
        Contiguous tensor of the shape and dtype of `x`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or values do not fit.
        RuntimeError: A second derivative is asked for.

    Example:
        >>> import torch, halfbyte as hb
        >>> x, values = torch.tensor([[0.3, -0.1, 0.9, -2.0]]), (-0.75, -0.25, 0.25, 0.75)
        >>> scale = torch.tensor([[1.0]], requires_grad=True)
        >>> y = hb.ops.fake_quantize_codebook(x, scale, values, group_size=4)
        >>> y
        tensor([[ 0.2500, -0.2500,  0.7500, -0.7500]], grad_fn=<...>)
        >>> y.sum().backward()
        >>> scale.grad  # (0.25 - 0.3) + (-0.25 + 0.1) + (0.75 - 0.9) - 0.75
        tensor([[-1.1000]])
    """
    return _fake_quantize_codebook(*_codebook(x, scale, values, group_size, clip, grad_factor))


def fake_quantize_codebook_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    values: Sequence[float],
    *,
    group_size: int,
    clip: float | None = None,
    grad_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The backward pass of `fake_quantize_codebook`, for functions of one's own that save less than autograd would.

    Args:
        grad: Gradient of the result, of the shape and dtype of `x`.
        x, scale, values, group_size, clip, grad_factor: As for `fake_quantize_codebook`.

    Returns:
        Gradients of `x`, in its dtype, and of `scale`, in float32.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or values do not fit.
    """
    check_gradient(grad, x)
    gradients: tuple[Tensor, Tensor] = _fake_quantize_codebook_backward(
        grad, *_codebook(x, scale, values, group_size, clip, grad_factor)
    )
    return gradients


def fake_quantize_binary(
    x: Tensor, scale: Tensor, *, group_size: int, clip: float = 1.0, grad_factor: float = 1.0
) -> Tensor:
    """`scale` where `x >= 0`, `-scale` elsewhere; differentiable in `x` and `scale`.

    The gradient of `x` is passed straight through where `|x / scale| <= clip` and 0 elsewhere (the clipped estimator of
    arXiv:1602.02830); that of `scale` is exact, the sign of `x`, times `grad_factor`. The scale is one of each filter in
    XNOR-Net (arXiv:1603.05279).

    Args:
        x: `[..., I]`; float32, bfloat16 or float16. NaN stays NaN.
        scale: `[..., I / group_size]`, positive.
        group_size: Elements of the last dimension that share a scale.
        clip: Largest `|x / scale|` whose gradient passes.
        grad_factor: Factor of the gradient of `scale`.

    Returns:
        Contiguous tensor of the shape and dtype of `x`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.fake_quantize_binary(torch.tensor([0.3, -0.1, 0.0]), torch.tensor([0.5]), group_size=3)
        tensor([ 0.5000, -0.5000,  0.5000])
    """
    return _fake_quantize_codebook(*_binary(x, scale, group_size, clip, grad_factor))


def fake_quantize_binary_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, *, group_size: int, clip: float = 1.0, grad_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The backward pass of `fake_quantize_binary`: gradients of `x` and of `scale`; arguments and errors as there."""
    check_gradient(grad, x)
    gradients: tuple[Tensor, Tensor] = _fake_quantize_codebook_backward(
        grad, *_binary(x, scale, group_size, clip, grad_factor)
    )
    return gradients


def _codebook(
    x: Tensor, scale: Tensor, values: Sequence[float], group_size: int, clip: float | None, grad_factor: float
) -> tuple[object, ...]:
    """What the C++ operators get, checked."""
    if not 2 <= len(values) <= CODEBOOK_ENTRIES:
        raise ValueError(f"values has {len(values)} entries; use 2 to {CODEBOOK_ENTRIES}")
    if not all(a < b for a, b in pairwise(values)) or math.isinf(values[0]) or math.isinf(values[-1]):
        raise ValueError(f"values={tuple(values)} are not finite and increasing; use sorted(set(values))")
    low, high = 1.5 * values[0] - 0.5 * values[1], 1.5 * values[-1] - 0.5 * values[-2]
    if clip is not None:
        low, high = -clip, clip
    return _arguments(x, scale, torch.tensor(values, dtype=torch.float32), group_size, False, low, high, grad_factor)


def _binary(x: Tensor, scale: Tensor, group_size: int, clip: float, grad_factor: float) -> tuple[object, ...]:
    values = torch.tensor([-1.0, 1.0])
    return _arguments(x, scale, values, group_size, True, -clip, clip, grad_factor)


def _arguments(
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    group_size: int,
    binary: bool,
    low: float,
    high: float,
    grad_factor: float,
) -> tuple[object, ...]:
    check_float(x, "x")
    check_float(scale, "scale")
    shape = qparams_shape(x, None, group_size, "x")
    if scale.shape != shape:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; x of shape {tuple(x.shape)} with group_size={group_size} needs "
            f"{shape}"
        )
    if not low < high:
        raise ValueError(f"clip={high} is not positive")
    if not math.isfinite(grad_factor):
        raise ValueError(f"grad_factor={grad_factor} is not finite")
    return x, scale.float(), values, group_size, binary, low, high, grad_factor


# Fake kernels: shapes and dtypes of the results, contiguous like the real ones.


def _fake_quantize_codebook_fake(
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    group_size: int,
    binary: bool,
    clip_low: float,
    clip_high: float,
    grad_factor: float,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_quantize_codebook_backward_fake(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    values: Tensor,
    group_size: int,
    binary: bool,
    clip_low: float,
    clip_high: float,
    grad_factor: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


torch.library.register_fake("halfbyte::fake_quantize_codebook", _fake_quantize_codebook_fake)
torch.library.register_fake("halfbyte::fake_quantize_codebook_backward", _fake_quantize_codebook_backward_fake)
_fake_quantize_codebook = with_gradients("fake_quantize_codebook", saved=3)
