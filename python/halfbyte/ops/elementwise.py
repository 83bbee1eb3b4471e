"""Fake-quantize, quantize, dequantize, min/max, and the search for good scales.

Granularity is given alike everywhere. Neither `axis` nor `group_size`: one scale for the tensor. `axis`: one for each
index along that dimension, `scale` has shape `[x.shape[axis]]`. `group_size`: one for that many consecutive elements of
the last dimension, `scale` has shape `[*x.shape[:-1], x.shape[-1] // group_size]`; `group_size=x.shape[-1]` is per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import refuse_second_derivative
from halfbyte.ops.checks import (
    FLOAT_DTYPES,
    check_bits,
    check_codebook_entries,
    check_codes,
    check_float,
    check_group_size,
    check_qparams,
    check_range,
    qparams_shape,
)

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_mask",
    "observe_minmax",
    "quantize",
    "search_qparams",
    "straight_through",
]

_fake_quantize = torch.ops.halfbyte.fake_quantize.default
_fake_quantize_train = torch.ops.halfbyte.fake_quantize_train.default
_fake_quantize_backward = torch.ops.halfbyte.fake_quantize_backward.default
_quantize = torch.ops.halfbyte.quantize.default
_dequantize = torch.ops.halfbyte.dequantize.default
_observe_minmax = torch.ops.halfbyte.observe_minmax.default
_search_qparams = torch.ops.halfbyte.search_qparams.default


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Rounds `x` to the values that its quantized form can hold; differentiable.

    `(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`, computed in float32 and equal bit for bit to
    PyTorch's `fake_quantize_per_tensor_affine` and `fake_quantize_per_channel_affine` on finite input. The gradient
    passes straight through where the code lies inside `[qmin, qmax]` and is zero elsewhere. NaN stays NaN, gradient zero.

    Args:
        x: Any shape; float32, bfloat16 or float16.
        scale: Positive; the shape that the granularity asks for. Gets no gradient.
        zero_point: Integers of the same shape.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension whose indices have their own scale.
        group_size: Elements of the last dimension that share a scale.

    Returns:
        Contiguous tensor of the shape and dtype of `x`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes, ranges or granularity do not fit, or `scale` requires a gradient.

    Example:
        >>> import torch, halfbyte as hb
        >>> x = torch.tensor([0.12, -0.9, 3.0], requires_grad=True)
        >>> y = hb.ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
        >>> y
        tensor([ 0.1000, -0.8000,  0.7000], grad_fn=<...>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 0., 0.])
    """
    check_float(x, "x")
    check_range(qmin, qmax)
    scale, zero_point = check_qparams(x, scale, zero_point, axis, group_size, "x")
    if torch.is_grad_enabled():
        if scale.requires_grad:
            raise ValueError("scale requires a gradient, which fake_quantize does not give; pass scale.detach()")
        if x.requires_grad:
            y: Tensor
            if torch.compiler.is_compiling():
                y, _ = _fake_quantize_train(x, scale, zero_point, qmin, qmax, axis, group_size)
            else:
                y = _StraightThrough.apply(  # type: ignore[no-untyped-call]
                    x, scale, zero_point, qmin, qmax, axis, group_size
                )
            return y
    result: Tensor = _fake_quantize(x, scale, zero_point, qmin, qmax, axis, group_size)
    return result


@torch.no_grad()
def fake_quantize_mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`fake_quantize` and where its gradient passes, in one pass over memory; for autograd functions of one's own.

    Args:
        x, scale, zero_point, qmin, qmax, axis, group_size: As for `fake_quantize`.

    Returns:
        The value, without a gradient, and a mask of a bit an element, uint8 `[ceil(numel / 8)]`, for `straight_through`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes, ranges or granularity do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> x = torch.tensor([0.12, -0.9, 3.0])
        >>> y, mask = hb.ops.fake_quantize_mask(x, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
        >>> hb.ops.straight_through(torch.ones(3), mask)
        tensor([1., 0., 0.])
    """
    check_float(x, "x")
    check_range(qmin, qmax)
    scale, zero_point = check_qparams(x, scale, zero_point, axis, group_size, "x")
    y, mask = _fake_quantize_train(x, scale, zero_point, qmin, qmax, axis, group_size)
    return y, mask


@torch.no_grad()
def straight_through(grad: Tensor, mask: Tensor) -> Tensor:
    """`grad` where `mask` has a bit, else 0: the gradient of `fake_quantize`, without one of its own.

    Args:
        grad: Gradient of the value, of its shape; float32, bfloat16 or float16.
        mask: What `fake_quantize_mask` gave.

    Returns:
        Contiguous tensor like `grad`.

    Raises:
        TypeError: `grad` has the wrong dtype.
        ValueError: `mask` is not that of a tensor of as many elements.
    """
    check_float(grad, "grad")
    if mask.dtype is not torch.uint8 or mask.numel() != (grad.numel() + 7) // 8:
        raise ValueError(f"mask has {mask.numel()} bytes ({mask.dtype}); grad needs {(grad.numel() + 7) // 8} of uint8")
    passed: Tensor = _fake_quantize_backward(grad, mask)
    return passed


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Codes of `x`: `clamp(round(x / scale) + zero_point, qmin, qmax)`; NaN becomes `zero_point`.

    Args:
        x: Any shape; float32, bfloat16 or float16.
        scale: Positive; the shape that the granularity asks for.
        zero_point: Integers of the same shape.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Dimension whose indices have their own scale.
        group_size: Elements of the last dimension that share a scale.

    Returns:
        Contiguous tensor of the shape of `x`; int8 if the range is signed and fits, uint8 if it is unsigned and fits, else
        int32.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes, ranges or granularity do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.quantize(torch.tensor([0.12, -0.9, 3.0]), torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
        tensor([ 1, -8,  7], dtype=torch.int8)
    """
    check_float(x, "x")
    check_range(qmin, qmax)
    scale, zero_point = check_qparams(x, scale, zero_point, axis, group_size, "x")
    q: Tensor = _quantize(x, scale, zero_point, qmin, qmax, axis, group_size)
    return q


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values that codes stand for: `(q - zero_point) * scale`, in float32, rounded once to `dtype`.

    Args:
        q: Any shape; int8, uint8 or int32.
        scale: The shape that the granularity asks for.
        zero_point: Integers of the same shape.
        axis: Dimension whose indices have their own scale.
        group_size: Elements of the last dimension that share a scale.
        dtype: float32, bfloat16 or float16.

    Returns:
        Contiguous tensor of the shape of `q`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or granularity do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> q = torch.tensor([1, -8, 7], dtype=torch.int8)
        >>> hb.ops.dequantize(q, torch.tensor(0.5), torch.tensor(0))
        tensor([ 0.5000, -4.0000,  3.5000])
    """
    check_codes(q, "q", (torch.int8, torch.uint8, torch.int32))
    _check_result_dtype(dtype, "dtype")
    scale, zero_point = check_qparams(q, scale, zero_point, axis, group_size, "q")
    y: Tensor = _dequantize(q, scale, zero_point, axis, group_size, dtype)
    return y


def observe_minmax(x: Tensor, *, axis: int | None = None, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the elements that share a scale, in one pass over memory.

    Args:
        x: At least one element; float32, bfloat16 or float16.
        axis: Dimension whose indices are observed apart.
        group_size: Elements of the last dimension that are observed together.

    Returns:
        `(lo, hi)`, float32, of the shape that `scale` has for this granularity. NaN among the elements gives NaN in both.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `x` is empty, or the granularity does not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.observe_minmax(torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), axis=0)
        (tensor([ 1., -3.]), tensor([2.0000, 0.5000]))
    """
    check_float(x, "x")
    shape = qparams_shape(x, axis, group_size, "x")
    if x.numel() == 0 and (shape is None or 0 not in shape):
        raise ValueError(f"x of shape {tuple(x.shape)} is empty: it has no minimum and maximum")
    lo, hi = _observe_minmax(x, axis, group_size)
    return lo, hi


def search_qparams(
    w: Tensor,
    importance: Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    narrow_range: bool = False,
    group_size: int | None = None,
    grid: int = 80,
    max_shrink: float = 0.8,
    scale_dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (and zero points) of a weight that minimise `sum(importance * (x_hat - w)**2)` in every group.

    Tries the ranges `p * [min, max]` for `p = 1 - j * max_shrink / grid`, `j = 0 .. grid - 1`, then one weighted
    least-squares refit of the scale to the best codes, which is kept where it loses less. Scales are rounded to
    `scale_dtype` before errors are taken, so that the loss is what the stored scale gives. `grid=1` gives min/max qparams.
    One symmetric bit means `w = ±scale`: the scale is then the weighted mean of `|w|`.

    Args:
        w: `[O, I]`; float32, bfloat16 or float16.
        importance: `[I]` or `[O, I]`, not negative, or None for equal importance.
        bits: 1 to 8.
        symmetric: Signed codes without zero point; else unsigned codes and a range that contains 0.
        narrow_range: Symmetric only: leave out the most negative code.
        group_size: Inputs that share a scale; None: all of a row.
        grid: Number of ranges to try.
        max_shrink: Largest part of the range to cut off, in [0, 1).
        scale_dtype: float32, bfloat16 or float16.
        codebook: `[n]` float32, 2 to 16 increasing values: `x̂` is `scale` times the nearest one, the whole range is
            `absmax / largest value`, and `bits`, `symmetric` and `narrow_range` play no part.

    Returns:
        `(scale, zero_point, loss)`, each `[O, I // group_size]`: `scale` in `scale_dtype`, at least the smallest normal
        number and 1 for a group of zeros; `zero_point` int32 (zeros if symmetric); `loss` float32. A group that
        holds NaN or inf gets NaN for scale and loss.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or options do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> w = torch.tensor([[0.1, -0.2, 0.3, 8.0]])
        >>> scale, _, loss = hb.ops.search_qparams(w, bits=4, symmetric=True, grid=1)
        >>> scale
        tensor([[1.1429]])
    """
    check_float(w, "w")
    check_bits(bits)
    _check_result_dtype(scale_dtype, "scale_dtype")
    if w.dim() != 2:
        raise ValueError(f"w has shape {tuple(w.shape)}; search_qparams takes a matrix (w.flatten(1) makes one)")
    if narrow_range and (not symmetric or bits == 1):
        raise ValueError("narrow_range=True needs symmetric=True and at least 2 bits")
    if grid < 1:
        raise ValueError(f"grid={grid} is not positive; grid=1 tries the min/max range alone")
    if not 0 <= max_shrink < 1:
        raise ValueError(f"max_shrink={max_shrink} is outside [0, 1)")
    group = max(w.shape[1], 1) if group_size is None else group_size
    check_group_size(group, w.shape[1], "w")
    if importance is not None:
        check_float(importance, "importance")
        if importance.shape not in (w.shape, w.shape[1:]):
            raise ValueError(
                f"importance has shape {tuple(importance.shape)}; use {tuple(w.shape[1:])} or {tuple(w.shape)}"
            )
        importance = importance.detach().float()
    check_codebook_entries(codebook)
    scale, zero_point, loss = _search_qparams(
        w.detach(), importance, bits, symmetric, narrow_range, group, grid, max_shrink, scale_dtype, codebook
    )
    return scale, zero_point, loss


def _check_result_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}={dtype} is not supported; use float32, bfloat16 or float16")


# Fake kernels: shapes and dtypes of the results, contiguous like the real ones.


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _fake_quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, group_size: int | None
) -> Tensor:
    return _contiguous_like(x)


def _fake_quantize_train_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _fake_quantize_backward_fake(grad: Tensor, mask: Tensor) -> Tensor:
    return _contiguous_like(grad)


def _quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, group_size: int | None
) -> Tensor:
    if qmin < 0:
        return _contiguous_like(x, torch.int8 if qmin >= -128 and qmax <= 127 else torch.int32)
    return _contiguous_like(x, torch.uint8 if qmax <= 255 else torch.int32)


def _dequantize_fake(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    return _contiguous_like(q, dtype)


def _observe_minmax_fake(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    shape = qparams_shape(x, axis, group_size, "x") or ()
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _search_qparams_fake(
    w: Tensor,
    importance: Tensor | None,
    bits: int,
    symmetric: bool,
    narrow_range: bool,
    group_size: int,
    grid: int,
    max_shrink: float,
    scale_dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (w.shape[0], w.shape[1] // group_size)
    return (
        w.new_empty(shape, dtype=scale_dtype),
        w.new_empty(shape, dtype=torch.int32),
        w.new_empty(shape, dtype=torch.float32),
    )


torch.library.register_fake("halfbyte::fake_quantize", _fake_quantize_fake)
torch.library.register_fake("halfbyte::fake_quantize_train", _fake_quantize_train_fake)
torch.library.register_fake("halfbyte::fake_quantize_backward", _fake_quantize_backward_fake)
torch.library.register_fake("halfbyte::quantize", _quantize_fake)
torch.library.register_fake("halfbyte::dequantize", _dequantize_fake)
torch.library.register_fake("halfbyte::observe_minmax", _observe_minmax_fake)
torch.library.register_fake("halfbyte::search_qparams", _search_qparams_fake)


# The gradient of fake_quantize: the straight-through estimator. Its own gradient is not defined.


def _save_mask(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _straight_through(ctx: FunctionCtx, grad: Tensor, grad_mask: None) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
    return _fake_quantize_backward(grad, mask), None, None, None, None, None, None


torch.library.register_autograd("halfbyte::fake_quantize_train", _straight_through, setup_context=_save_mask)
refuse_second_derivative("fake_quantize")


class _StraightThrough(torch.autograd.Function):
    """The same for eager mode, past the dispatcher's Python autograd kernel, which takes 15 us more a call."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, mask = _fake_quantize_train(*args)
        ctx.save_for_backward(mask)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses a second derivative
            return _straight_through(ctx, grad, None)
        with torch._C._AutoDispatchBelowAutograd():
            return _straight_through(ctx, grad, None)
