"""Convolutions with packed weights: integer products of INT8 activations (`conv_int8`), or float activations.

Weights are matrices `[O, taps * C/groups]` in the tiles layout, inputs in the order (tap, channel); `conv.h` fixes the order of
the arithmetic: equal bits on every ISA level and for all threads. Gradients flow to `x` and `bias`, straight through the
rounding of `x`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.convolution import ConvGeometry
from halfbyte.ops.autograd import skipped_autograd
from halfbyte.ops.checks import check_bits, check_codebook, check_float
from halfbyte.ops.linear import check_single, check_weight, dequantized_weight

__all__ = ["conv_int8", "conv_weight_only"]

_conv_int8 = torch.ops.halfbyte.conv_int8.default

IntOrSizes = int | Sequence[int]


def conv_int8(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: IntOrSizes,
    stride: IntOrSizes = 1,
    padding: IntOrSizes = 0,
    dilation: IntOrSizes = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrSizes = 0,
    bits: int = 8,
    group_size: int | None = None,
    act_scale: Tensor | None = None,
    act_zero_point: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_min: int = -128,
    out_max: int = 127,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """Convolution with exact integer products of INT8 activations and 1- to 8-bit weights, over 1 to 3 dimensions.

    With `out_scale` the result is INT8 too: `quantize(y, out_scale, out_zero_point)` of the float32 result `y`, or of
    `y + dequantize(residual)`, limited to `[out_min, out_max]`, which is where a ReLU goes.

    Args:
        x: `[N, C, ...]` with 1 to 3 spatial dimensions. float32, bfloat16 or float16, quantized here; or int8 codes, which need
            `act_scale`. Fastest channels last.
        qweight: uint8 codes `[O, taps * C/groups]` in the tiles layout, inputs in the order (tap, channel).
        scale: `[G, O]`; float32, bfloat16 or float16.
        zero_point: `[G, O]` uint8; None for symmetric weights and, with `bits=1`, for ±scale.
        bias: `[O]`, any of the three float dtypes.
        out_channels: O.
        kernel_size: One number, or one for each spatial dimension; so are `stride`, `dilation` and `output_padding`.
        stride, dilation, groups, output_padding: As in `torch.nn.functional.conv2d` and `conv_transpose2d`.
        padding: Zeros around the input: one number, one a dimension, or two a dimension, all befores first.
        transposed: Transposed convolution.
        bits: 1 to 8, of the weights.
        group_size: Inputs that share a scale; None: all of an output's.
        act_scale: One float32: quantize `x` with it. None: every sample with `absmax / 127`, codes in [-127, 127].
        act_zero_point: One int32 in [-128, 127], with `act_scale`; None: 0.
        out_scale: One float32: give int8 codes.
        out_zero_point: One int32 in [-128, 127], with `out_scale`; None: 0.
        out_min, out_max: Smallest and largest code of the result.
        residual: int8 codes of the result's shape, added before requantizing; with `out_scale` and `residual_scale`.
        residual_scale: One float32.
        residual_zero_point: One int32 in [-128, 127]; None: 0.

    Returns:
        `[N, O, ...]` in the dtype of `x` (float32 for codes), channels last in memory if `x` is; or int8 codes, always channels
        last in memory.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others.

    Example:
        >>> import torch, halfbyte as hb
        >>> codes = torch.tensor([[1, 2, 3]], dtype=torch.int8)  # one output, three taps, one channel
        >>> qweight = hb.ops.pack(codes, 8, layout="tiles")
        >>> scale = torch.tensor([[1.0]])
        >>> hb.ops.conv_int8(torch.full((1, 1, 4), 127.0), qweight, scale, out_channels=1, kernel_size=3, padding=1)
        tensor([[[635., 762., 762., 381.]]])
    """
    g = _geometry(x, out_channels, kernel_size, stride, padding, dilation, groups, transposed, output_padding)
    if x.dtype is not torch.int8:
        check_float(x, "x")
    elif act_scale is None:
        raise ValueError("x holds int8 codes; give their act_scale")
    group = _check_operands(g, qweight, scale, zero_point, bias, bits, group_size)
    for name, value, zero_name, zero in (
        ("act_scale", act_scale, "act_zero_point", act_zero_point),
        ("out_scale", out_scale, "out_zero_point", out_zero_point),
        ("residual_scale", residual_scale, "residual_zero_point", residual_zero_point),
    ):
        if value is not None:
            check_single(value, name, torch.float32)
        if zero is not None:
            if value is None:
                raise ValueError(f"{zero_name} is given without {name}; pass both, or neither")
            check_single(zero, zero_name, torch.int32)
    if not -128 <= out_min <= out_max <= 127:
        raise ValueError(f"out_min={out_min}, out_max={out_max} is not a range of int8 codes")
    if residual is not None:
        if out_scale is None or residual_scale is None:
            raise ValueError("residual needs residual_scale and out_scale: it is added before requantizing")
        if residual.dtype is not torch.int8:
            raise TypeError(f"residual has dtype {residual.dtype}; use int8 codes")
        expected = (x.shape[0], out_channels, *g.output_size(x.shape[2:]))
        if residual.shape != expected:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; the result has {expected}")
    with skipped_autograd(x, bias):
        y: Tensor = _conv_int8(
            x,
            qweight,
            scale,
            zero_point,
            bias,
            bits,
            out_channels,
            group,
            g.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.output_padding,
            groups,
            transposed,
            act_scale,
            act_zero_point,
            out_scale,
            out_zero_point,
            out_min,
            out_max,
            residual,
            residual_scale,
            residual_zero_point,
        )
    return y


def conv_weight_only(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: IntOrSizes,
    stride: IntOrSizes = 1,
    padding: IntOrSizes = 0,
    dilation: IntOrSizes = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrSizes = 0,
    bits: int,
    group_size: int | None = None,
    codebook: Tensor | None = None,
) -> Tensor:
    """Convolution of float activations with 1- to 8-bit weights: torch's own, in float32, with the dequantized weight.

    The weight is dequantized at every call and dropped after it, so memory holds one layer's float weight at a time.

    Args:
        x: `[N, C, ...]` with 1 to 3 spatial dimensions; float32, bfloat16 or float16.
        qweight, scale, zero_point, bias: As in `conv_int8`.
        out_channels, kernel_size, stride, padding, dilation, groups, transposed, output_padding: As in `conv_int8`.
        bits, group_size: As in `conv_int8`.
        codebook: `[16]` float32, the value of each (unsigned) code of at most 4 bits; `zero_point` is None then.

    Returns:
        `[N, O, ...]` in the dtype of `x`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others.

    Example:
        >>> import torch, halfbyte as hb
        >>> qweight = hb.ops.pack(torch.tensor([[1, 2, 3]], dtype=torch.int8), 4, layout="tiles")
        >>> scale = torch.tensor([[0.5]])
        >>> hb.ops.conv_weight_only(torch.ones(1, 1, 4), qweight, scale, bits=4, out_channels=1, kernel_size=3)
        tensor([[[3., 3.]]])
    """
    g = _geometry(x, out_channels, kernel_size, stride, padding, dilation, groups, transposed, output_padding)
    check_float(x, "x")
    group = _check_operands(g, qweight, scale, zero_point, bias, bits, group_size)
    check_codebook(codebook, bits, zero_point)
    weight = g.weight_of(_matrix(g, qweight, scale, zero_point, bits, group, codebook))
    return g.convolve(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _geometry(
    x: Tensor,
    out_channels: int,
    kernel_size: IntOrSizes,
    stride: IntOrSizes,
    padding: IntOrSizes,
    dilation: IntOrSizes,
    groups: int,
    transposed: bool,
    output_padding: IntOrSizes,
) -> ConvGeometry:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; pass a torch.Tensor")
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x has shape {tuple(x.shape)}; it needs [N, C, ...] with 1 to 3 spatial dimensions")
    make = _make_geometry if torch.compiler.is_compiling() else _known_geometry
    given = (kernel_size, stride, padding, dilation, output_padding)
    sizes = [size if isinstance(size, int) else tuple(size) for size in given]
    g = make(x.dim() - 2, x.shape[1], out_channels, groups, transposed, *sizes)
    if min(g.output_size(x.shape[2:])) < 1 and min(x.shape[2:]) > 0:
        raise ValueError(
            f"x of shape {tuple(x.shape)} is too small for kernel_size={g.kernel_size}, dilation={g.dilation}, "
            f"padding={g.padding}"
        )
    return g


def _make_geometry(
    dims: int,
    in_channels: int,
    out_channels: int,
    groups: int,
    transposed: bool,
    kernel_size: IntOrSizes,
    stride: IntOrSizes,
    padding: IntOrSizes,
    dilation: IntOrSizes,
    output_padding: IntOrSizes,
) -> ConvGeometry:
    def sizes(value: IntOrSizes, name: str) -> tuple[int, ...]:
        if isinstance(value, int):
            return (value,) * dims
        if len(value) != dims:
            raise ValueError(f"{name}={tuple(value)} has {len(value)} entries; x needs {dims}, one a spatial dimension")
        return tuple(value)

    if isinstance(padding, int) or len(padding) != 2 * dims:
        padding = sizes(padding, "padding") * 2
    return ConvGeometry(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=sizes(kernel_size, "kernel_size"),
        stride=sizes(stride, "stride"),
        padding=tuple(padding),
        dilation=sizes(dilation, "dilation"),
        output_padding=sizes(output_padding, "output_padding"),
        groups=groups,
        transposed=transposed,
    )


_known_geometry = lru_cache(maxsize=1024)(_make_geometry)  # checks cost 5 us a call


def _check_operands(
    g: ConvGeometry,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int | None,
) -> int:
    """Checks weight and bias; returns the group size as a number."""
    check_bits(bits)
    inputs = prod(g.kernel_size) * (g.in_channels // g.groups)
    group = max(inputs, 1) if group_size is None else group_size
    if group < 1 or inputs % group:
        raise ValueError(f"group_size={group_size} does not divide the {inputs} inputs of an output (taps * C/groups)")
    check_weight(qweight, scale, zero_point, bias, bits, g.out_channels, inputs, group)
    return group


def _matrix(
    g: ConvGeometry,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    out_features, in_features = g.shape
    return dequantized_weight(
        qweight,
        scale,
        zero_point,
        bits=bits,
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        codebook=codebook,
    )


def _geometry_of_call(x_channels: int, args: Sequence[object]) -> ConvGeometry:
    out_channels, _, kernel_size, stride, padding, dilation, output_padding, groups, transposed = args
    return ConvGeometry(
        in_channels=x_channels,
        out_channels=out_channels,  # type: ignore[arg-type]
        kernel_size=tuple(kernel_size),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        padding=tuple(padding),  # type: ignore[arg-type]
        dilation=tuple(dilation),  # type: ignore[arg-type]
        output_padding=tuple(output_padding),  # type: ignore[arg-type]
        groups=groups,  # type: ignore[arg-type]
        transposed=transposed,  # type: ignore[arg-type]
    )


def _conv_int8_fake(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    *args: object,
) -> Tensor:
    g = _geometry_of_call(x.shape[1], args[:9])
    out_scale = args[11]
    dtype = torch.int8 if out_scale is not None else torch.float32 if x.dtype is torch.int8 else x.dtype
    out = g.output_size(x.shape[2:])
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    if channels_last or out_scale is not None:
        return x.new_empty((x.shape[0], *out, g.out_channels), dtype=dtype).movedim(-1, 1)
    return x.new_empty((x.shape[0], g.out_channels, *out), dtype=dtype)


torch.library.register_fake("halfbyte::conv_int8", _conv_int8_fake)


# Gradients: those of the float convolution with the dequantized weight. What x is rounded to is passed straight through.


def _setup_context(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    x, qweight, scale, zero_point, bias, bits = inputs[:6]
    assert isinstance(x, Tensor)
    ctx.save_for_backward(qweight, scale, zero_point)  # type: ignore[arg-type]
    ctx.bits, ctx.call = bits, inputs[6:15]  # type: ignore[attr-defined]
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype  # type: ignore[attr-defined]
    ctx.bias_dtype = bias.dtype if isinstance(bias, Tensor) else None  # type: ignore[attr-defined]
    ctx.inputs = len(inputs)  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    x_shape, call = ctx.x_shape, ctx.call  # type: ignore[attr-defined]
    grads: list[Tensor | None] = [None] * ctx.inputs  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    if needs[0]:
        g = _geometry_of_call(x_shape[1], call)
        weight = g.weight_of(_matrix(g, qweight, scale, zero_point, ctx.bits, call[1]))  # type: ignore[attr-defined]
        with torch.enable_grad():
            x = torch.zeros(x_shape, requires_grad=True)
            (grad_x,) = torch.autograd.grad(g.convolve(x, weight), x, grad.float())
        grads[0] = grad_x.to(ctx.x_dtype)  # type: ignore[attr-defined]
    if needs[4]:
        dims = [0, *range(2, grad.dim())]
        grads[4] = grad.float().sum(dims).to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return tuple(grads)


torch.library.register_autograd("halfbyte::conv_int8", _backward, setup_context=_setup_context)
