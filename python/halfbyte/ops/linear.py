"""Products of activations with packed weights: float activations (`linear_weight_only`) or INT8 ones (`linear_int8`).

Weights are in the tiles layout. `matmul.h` fixes the order of the arithmetic: results are equal bit for bit on every ISA
level, for every number of rows and threads. Gradients flow to `x` and `bias`, straight through the rounding of `x`; the
integers of the weight have none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.functional import dequantize_codebook
from halfbyte.ops.autograd import skipped_autograd
from halfbyte.ops.checks import FLOAT_DTYPES, check_bits, check_codebook, check_float, check_group_size
from halfbyte.ops.elementwise import dequantize
from halfbyte.ops.packing import packed_shape, unpack

__all__ = ["linear_int4_int8", "linear_int8", "linear_weight_only"]

_linear_weight_only = torch.ops.halfbyte.linear_weight_only.default
_linear_int8 = torch.ops.halfbyte.linear_int8.default


def linear_weight_only(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    out_features: int,
    group_size: int | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """`x Wᵀ + bias` with `W[o, i] = (u - zero_point[g, o]) * scale[g, o]`, accumulated in float32.

    With a codebook `W[o, i] = codebook[u] * scale[g, o]`.

    Args:
        x: `[..., I]`; float32, bfloat16 or float16.
        qweight: uint8 codes in the tiles layout, `hb.ops.pack(codes, bits, layout="tiles", group_size=group_size)`.
        scale: `[G, O]`, transposed; float32, bfloat16 or float16.
        zero_point: `[G, O]` uint8; None for symmetric weights (signed codes) and, with `bits=1`, for ±scale.
        bias: `[O]`, any of the three float dtypes.
        bits: 1 to 8.
        out_features: O.
        group_size: Inputs that share a scale; None: all of a row.
        codebook: `[16]` float32, the value of each (unsigned) code of at most 4 bits; `zero_point` is None then.

    Returns:
        `[..., O]` in the dtype of `x`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others.

    Example:
        >>> import torch, halfbyte as hb
        >>> codes = torch.tensor([[1, -2, 3, 0]], dtype=torch.int8)
        >>> qweight = hb.ops.pack(codes, 4, layout="tiles")
        >>> hb.ops.linear_weight_only(torch.ones(2, 4), qweight, torch.tensor([[0.5]]), bits=4, out_features=1)
        tensor([[1.],
                [1.]])
    """
    try:
        group = _group(x, group_size)
        with skipped_autograd(x, bias):
            y: Tensor = _linear_weight_only(x, qweight, scale, zero_point, bias, bits, out_features, group, codebook)
    except Exception:
        _check(x, qweight, scale, zero_point, bias, bits, out_features, group_size)
        check_codebook(codebook, bits, zero_point)
        raise
    return y


def linear_int8(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    out_features: int,
    group_size: int | None = None,
    act_scale: Tensor | None = None,
    act_zero_point: Tensor | None = None,
    asymmetric: bool = False,
) -> Tensor:
    """`x Wᵀ + bias` with exact integer products of INT8 activations and 1- to 8-bit weights.

    Args:
        x: `[..., I]`; float32, bfloat16 or float16. Quantized here, to INT8.
        qweight: As in `linear_weight_only`.
        scale: As in `linear_weight_only`.
        zero_point: As in `linear_weight_only`.
        bias: As in `linear_weight_only`.
        bits: 1 to 8.
        out_features: O.
        group_size: Inputs that share a scale; None: all of a row.
        act_scale: One float32: quantize every row with it. None: each row with `absmax / 127`, codes in [-127, 127].
        act_zero_point: One int32 in [-128, 127], with `act_scale`; None: 0.
        asymmetric: Without `act_scale`: a scale and a zero point for each row, whose 256 codes cover its range.

    Returns:
        `[..., O]` in the dtype of `x`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others.

    Example:
        >>> import torch, halfbyte as hb
        >>> codes = torch.tensor([[100, -50, 25, 0]], dtype=torch.int8)
        >>> qweight = hb.ops.pack(codes, 8, layout="tiles")
        >>> hb.ops.linear_int8(torch.ones(1, 4), qweight, torch.tensor([[0.5]]), out_features=1)
        tensor([[37.5000]])
    """
    try:
        group = _group(x, group_size)
        with skipped_autograd(x, bias):
            y: Tensor = _linear_int8(
                x, qweight, scale, zero_point, bias, bits, out_features, group, act_scale, act_zero_point, asymmetric
            )
    except Exception:
        _check(x, qweight, scale, zero_point, bias, bits, out_features, group_size)
        check_activation(act_scale, act_zero_point, asymmetric)
        raise
    return y


def linear_int4_int8(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    group_size: int | None = None,
    act_scale: Tensor | None = None,
    act_zero_point: Tensor | None = None,
    asymmetric: bool = False,
) -> Tensor:
    """`linear_int8` with 4-bit weights (W4A8).

    Args:
        x: `[..., I]`; float32, bfloat16 or float16.
        qweight: 4-bit codes in the tiles layout.
        scale: `[G, O]`.
        zero_point: `[G, O]` uint8 or None.
        bias: `[O]` or None.
        out_features: O.
        group_size: Inputs that share a scale; None: all of a row.
        act_scale: One float32, or None for dynamic activations.
        act_zero_point: One int32, or None.
        asymmetric: As in `linear_int8`.

    Returns:
        `[..., O]` in the dtype of `x`.

    Example:
        >>> import torch, halfbyte as hb
        >>> qweight = hb.ops.pack(torch.tensor([[1, -2, 3, 0]], dtype=torch.int8), 4, layout="tiles")
        >>> hb.ops.linear_int4_int8(torch.ones(1, 4), qweight, torch.tensor([[0.5]]), out_features=1)
        tensor([[1.]])
    """
    return linear_int8(
        x,
        qweight,
        scale,
        zero_point,
        bias,
        bits=4,
        out_features=out_features,
        group_size=group_size,
        act_scale=act_scale,
        act_zero_point=act_zero_point,
        asymmetric=asymmetric,
    )


def _check(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int | None,
) -> None:
    """Raises what is wrong with the operands of a linear layer, in its caller's words.

    The operators check the same without any: Python looks again only when they have refused, and where shapes are all
    that there is.
    """
    check_float(x, "x")
    check_bits(bits)
    if x.dim() == 0:
        raise ValueError("x has no dimensions; it needs [..., in_features]")
    in_features = x.shape[-1]
    group = _group(x, group_size)
    if scale.dim() == 2 and group > 0 and in_features % group != 0:
        raise ValueError(
            f"x has {in_features} features in its last dimension; the weight takes in_features={scale.shape[0] * group}"
        )
    check_group_size(group, in_features, "x")
    check_weight(qweight, scale, zero_point, bias, bits, out_features, in_features, group)


def _group(x: Tensor, group_size: int | None) -> int:
    return max(x.shape[-1], 1) if group_size is None else group_size


def check_weight(
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group: int,
) -> None:
    """Raises unless a packed weight `[O, I]`, its qparams and a bias fit together."""
    if qweight.dtype is not torch.uint8:
        raise TypeError(f"qweight has dtype {qweight.dtype}; hb.ops.pack(..., layout='tiles') gives torch.uint8")
    expected = packed_shape((out_features, in_features), bits, layout="tiles", group_size=group)
    if qweight.shape != expected:
        raise ValueError(
            f"qweight has shape {tuple(qweight.shape)}; a weight of shape ({out_features}, {in_features}) with bits={bits}, "
            f"group_size={group} needs {expected}"
        )
    groups = (in_features // group, out_features)
    if scale.dtype not in FLOAT_DTYPES:
        check_float(scale, "scale")
    if scale.shape != groups:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; it needs [groups, out_features] = {groups}")
    if zero_point is not None:
        if zero_point.dtype is not torch.uint8:
            raise TypeError(f"zero_point has dtype {zero_point.dtype}; use torch.uint8")
        if zero_point.shape != groups:
            raise ValueError(f"zero_point has shape {tuple(zero_point.shape)}; it needs {groups}, as scale")
    if bias is not None:
        check_float(bias, "bias")
        if bias.shape != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it needs ({out_features},)")


def check_activation(act_scale: Tensor | None, act_zero_point: Tensor | None, asymmetric: bool = False) -> None:
    """Raises unless the qparams of static activations are both there, of one element each, or both absent."""
    if asymmetric and act_scale is not None:
        raise ValueError(
            "asymmetric=True finds zero points at run time; with act_scale, pass act_zero_point and leave it out"
        )
    if act_scale is not None:
        check_single(act_scale, "act_scale", torch.float32)
    if act_zero_point is not None:
        if act_scale is None:
            raise ValueError("act_zero_point is given without act_scale; pass both, or neither for dynamic activations")
        check_single(act_zero_point, "act_zero_point", torch.int32)


def check_single(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raises unless a tensor of qparams has one element of `dtype`."""
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; use {dtype}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs one element")


def _output_like(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_weight_only_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    _check(x, qweight, scale, zero_point, bias, bits, out_features, group_size)
    check_codebook(codebook, bits, zero_point)
    return _output_like(x, out_features)


def _linear_int8_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    asymmetric: bool = False,
) -> Tensor:
    _check(x, qweight, scale, zero_point, bias, bits, out_features, group_size)
    check_activation(act_scale, act_zero_point, asymmetric)
    return _output_like(x, out_features)


torch.library.register_fake("halfbyte::linear_weight_only", _linear_weight_only_fake)
torch.library.register_fake("halfbyte::linear_int8", _linear_int8_fake)


# Gradients: those of the float product with the dequantized weight. What x is rounded to is passed straight through.


def dequantized_weight(
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    """The float32 weight `[O, I]` that the products stand for."""
    signed = zero_point is None and bits > 1 and codebook is None
    codes = unpack(
        qweight, bits, shape=(out_features, in_features), layout="tiles", group_size=group_size, signed=signed
    )
    scale = scale.float().t()
    if codebook is not None:
        return dequantize_codebook(codes, scale, codebook, group_size=group_size)
    if zero_point is not None:
        zeros = zero_point.t().to(torch.int32)
    else:
        zeros = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
        if bits == 1:
            codes = codes.to(torch.int8) * 2 - 1
    return dequantize(codes, scale.contiguous(), zeros.contiguous(), group_size=group_size)


def _weight_only_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    _setup_context(ctx, inputs, inputs[8])


def _int8_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    _setup_context(ctx, inputs, None)


def _setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], codebook: object) -> None:
    x, qweight, scale, zero_point, bias, bits, out_features, group_size = inputs[:8]
    assert isinstance(x, Tensor)
    ctx.save_for_backward(qweight, scale, zero_point, codebook)  # type: ignore[arg-type]
    ctx.bits, ctx.out_features, ctx.group_size = bits, out_features, group_size  # type: ignore[attr-defined]
    ctx.in_features, ctx.x_dtype = x.shape[-1], x.dtype  # type: ignore[attr-defined]
    ctx.bias_dtype = bias.dtype if isinstance(bias, Tensor) else None  # type: ignore[attr-defined]


def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    qweight, scale, zero_point, codebook = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    if needs[0]:
        weight = dequantized_weight(
            qweight,
            scale,
            zero_point,
            bits=ctx.bits,  # type: ignore[attr-defined]
            out_features=ctx.out_features,  # type: ignore[attr-defined]
            in_features=ctx.in_features,  # type: ignore[attr-defined]
            group_size=ctx.group_size,  # type: ignore[attr-defined]
            codebook=codebook,
        )
        grad_x = (grad.float() @ weight).to(ctx.x_dtype)  # type: ignore[attr-defined]
    if needs[4]:
        grad_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return grad_x, grad_bias


def _weight_only_backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_bias = _gradients(ctx, grad)
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _int8_backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_bias = _gradients(ctx, grad)
    return grad_x, None, None, None, grad_bias, None, None, None, None, None, None


torch.library.register_autograd(
    "halfbyte::linear_weight_only", _weight_only_backward, setup_context=_weight_only_context
)
torch.library.register_autograd("halfbyte::linear_int8", _int8_backward, setup_context=_int8_context)
