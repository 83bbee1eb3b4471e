"""What a quantized module must compute, in plain torch: integer products exactly, floating point within proven bounds.

Works on some rows and some outputs at a time, so that a check of a large layer takes little memory. Symbols as in
`matmul.h`: `a` activation codes, `u` weight codes, `t` integer sums of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import functional
from halfbyte.formats import PackedFormat
from halfbyte.nn import PackedWeight, QuantizedConv, QuantizedEmbedding, QuantizedLinear, QuantizedModule
from halfbyte.nn.packed_weight import PANEL

_ELEMENTS = 1 << 21  # of any intermediate in float64: 16 MB
_MAX_CHUNK = 32768  # inputs that a kernel sums before it converts to float32 (matmul.h)
_LARGEST_ZERO_POINT = 128
_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff


@dataclass(frozen=True, slots=True)
class LinearReference:
    """Some outputs of a linear layer, for some rows.

    Attributes:
        outputs: Which columns.
        exact: `[R, columns]` float64: the value without rounding.
        bound: `[R, columns]` float64: the most that a kernel's rounding, in the documented order, can be off.
        integers: `[R, columns]` float64: sum over groups of the integer products, exact; None for float activations.
        reach: The largest magnitude that any partial sum of them can have; None for float activations.
    """

    outputs: slice
    exact: Tensor
    bound: Tensor
    integers: Tensor | None = None
    reach: Tensor | None = None

    def only(self, within: slice) -> LinearReference:
        """Less the columns outside of `within`."""
        begin, end = max(self.outputs.start, within.start), min(self.outputs.stop, within.stop)
        kept = slice(begin - self.outputs.start, end - self.outputs.start)
        return LinearReference(
            slice(begin, end),
            self.exact[:, kept],
            self.bound[:, kept],
            None if self.integers is None else self.integers[:, kept],
            None if self.reach is None else self.reach[:, kept],
        )


def linear_reference(module: QuantizedLinear, x: Tensor) -> Iterator[LinearReference]:
    """Reference of `module` on the rows `x` `[R, I]`, some outputs at a time."""
    codes, act_scale = None, None
    if module.scheme.activation:
        codes, act_scale = activation_codes(module, x)
    for outputs in _column_slices(module, x.shape[0]):
        if codes is None or act_scale is None:
            yield _float_reference(module, x, outputs)
        else:
            yield _int8_reference(module, codes, act_scale, x.dtype, outputs)


def conv_reference(module: QuantizedConv, x: Tensor, pixels: Tensor) -> Iterator[LinearReference]:
    """Reference of `module` on `x` `[N, C, ...]`, at some of the `N * output pixels` results, group by group."""
    geometry = module.geometry
    act_scale = None
    if module.scheme.activation:
        codes, of_sample = activation_codes(module, x.flatten(1))
        per_sample = torch.tensor(geometry.output_size(x.shape[2:])).prod()
        act_scale = of_sample.repeat_interleave(int(per_sample), 0)[pixels]
        rows = geometry.rows(codes.reshape(x.shape).double())[:, pixels]
    else:
        rows = geometry.rows(x.double())[:, pixels]
    outputs_each = geometry.out_channels // geometry.groups
    for group in range(geometry.groups):
        own = slice(group * outputs_each, (group + 1) * outputs_each)
        for outputs in _column_slices(module, len(pixels), own):
            if act_scale is None:
                yield _float_reference(module, rows[group], outputs, x.dtype).only(own)
            else:
                yield _int8_reference(module, rows[group], act_scale, x.dtype, outputs).only(own)


def _column_slices(module: QuantizedModule, rows: int, within: slice | None = None) -> Iterator[slice]:
    """Slices of outputs that begin at a panel and cover all outputs, or those of `within`."""
    out_features, in_features = module.packed_weight.shape
    within = within or slice(0, out_features)
    per_output = max(in_features, rows * (in_features // module.group_size))
    step = max(1, _ELEMENTS // per_output // PANEL) * PANEL
    for begin in range(within.start // PANEL * PANEL, within.stop, step):
        yield slice(begin, min(begin + step, -(-within.stop // PANEL) * PANEL, out_features))


def _int8_reference(
    module: QuantizedLinear | QuantizedConv, codes: Tensor, act_scale: Tensor, dtype: torch.dtype, outputs: slice
) -> LinearReference:
    weight, scale, _ = _grouped_weight(module, outputs)
    a = _grouped(codes.double(), module.group_size)  # [G, R, group]
    products = a @ weight.transpose(1, 2)  # [G, R, columns]: sums of integers below 2^53, exact
    # A group past the chunk is summed in parts, whose magnitudes add up to at most this.
    magnitudes = products.abs() if module.group_size <= _MAX_CHUNK else a.abs() @ weight.abs().transpose(1, 2)
    if (
        module.scheme.asymmetric_rows
    ):  # the kernel's codes are these plus a zero point, whose products it takes off later
        magnitudes = (a.abs() + 2 * _LARGEST_ZERO_POINT) @ weight.abs().transpose(1, 2)
    s = act_scale.double()
    bias = _bias(module, outputs)
    exact = s * (scale.unsqueeze(1) * products).sum(0) + bias
    # float(t), one fma a chunk, one for the activation scale and bias: each rounds a number no larger than this sum.
    magnitude = s * (scale.abs().unsqueeze(1) * magnitudes).sum(0) + bias.abs()
    roundings = products.shape[0] * -(-module.group_size // _MAX_CHUNK) + 5
    bound = _bound(exact, magnitude, roundings, dtype)
    return LinearReference(outputs, exact, bound, products.sum(0), magnitudes.sum(0))


def activation_codes(module: QuantizedLinear | QuantizedConv, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of inputs `[R, I]` less their zero point, and scales `[R, 1]`, found at run time or static.

    A row is a token of a linear layer, or a whole sample of a convolution.
    """
    activation = module.scheme.activation
    if activation is None or module.act_scale is None or module.act_zero_point is None:
        return functional.quantize_rows_dynamic(x, symmetric=not module.scheme.asymmetric_rows)
    half = 1 << (activation.bits - 1)
    codes = functional.quantize(x, module.act_scale, module.act_zero_point, qmin=-half, qmax=half - 1)
    codes = codes - module.act_zero_point
    return codes, module.act_scale.expand(x.shape[0], 1)


def _float_reference(
    module: QuantizedLinear | QuantizedConv, x: Tensor, outputs: slice, dtype: torch.dtype | None = None
) -> LinearReference:
    weight, scale, offset = _grouped_weight(module, outputs)
    rows = _grouped(x.double(), module.group_size)
    bias = _bias(module, outputs)
    exact = (scale.unsqueeze(1) * (rows @ weight.transpose(1, 2))).sum(0) + bias
    # The kernel sums x * (u - c) and, apart, x * (c - z): both magnitudes count. `offset` is c - z, `weight` is u - z.
    absolute = rows.abs()
    parts = absolute @ (weight - offset.unsqueeze(2)).abs().transpose(1, 2)
    parts = parts + absolute.sum(2, keepdim=True) * offset.abs().unsqueeze(1)
    magnitude = (scale.abs().unsqueeze(1) * parts).sum(0) + bias.abs()
    roundings = x.shape[1] + weight.shape[0] * 2 + 4
    return LinearReference(outputs, exact, _bound(exact, magnitude, roundings, dtype or x.dtype))


def _bound(exact: Tensor, magnitude: Tensor, roundings: int, dtype: torch.dtype) -> Tensor:
    # Higham, Accuracy and Stability of Numerical Algorithms, 3.1: n roundings are off by at most n*u / (1 - n*u), relative.
    relative = roundings * _UNIT[torch.float32]
    bound = magnitude * (relative / (1 - relative)) + torch.finfo(torch.float32).tiny
    if dtype != torch.float32:
        bound = bound * (1 + _UNIT[dtype]) + exact.abs() * _UNIT[dtype] + torch.finfo(dtype).tiny
    return bound


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """`[R, I]` as `[G, R, group_size]`."""
    return x.reshape(x.shape[0], -1, group_size).transpose(0, 1)


def _bias(module: QuantizedLinear | QuantizedConv, outputs: slice) -> Tensor:
    if module.bias is None:
        return torch.zeros(outputs.stop - outputs.start, dtype=torch.float64)
    return module.bias.detach()[outputs].double()


def _grouped_weight(module: QuantizedModule, outputs: slice) -> tuple[Tensor, Tensor, Tensor]:
    """`u - z` `[G, columns, group]`, scales `[G, columns]` and `c - z` `[G, columns]`, all float64 and exact.

    Of a codebook its values and zeros instead of `u - z` and `c - z`.
    """
    packed, weight_format = module.packed_weight, module.weight_format
    panels = slice(outputs.start // PANEL, -(-outputs.stop // PANEL))
    part = PackedWeight(
        packed.qweight[panels],
        packed.scale[:, outputs],
        None if packed.zero_point is None else packed.zero_point[:, outputs],
        "tiles",
        (outputs.stop - outputs.start, packed.shape[1]),
        packed.codebook,
    )
    codes, zero = _integers(part, weight_format)
    grouped = _grouped(codes, module.group_size)
    scale = part.scale.double()
    if weight_format.binary:  # 2u - 1 = 2(u - c) + 1
        return grouped, scale, torch.ones_like(scale)
    if zero is None:
        return grouped, scale, torch.zeros_like(scale)
    middle = 2.0 ** (weight_format.bits - 1)
    return grouped - zero.t().unsqueeze(2), scale, middle - zero.t()


def _integers(packed: PackedWeight, weight_format: PackedFormat) -> tuple[Tensor, Tensor | None]:
    """Codes `[O, I]` (-1 and +1 for binary, values of a codebook) and zero points `[O, G]`, float64."""
    codes = packed.codes(weight_format)
    if codes.codebook is not None:
        return codes.codebook.double()[codes.codes.long()], None
    numbers = codes.codes.double()
    if weight_format.binary:
        numbers = 2 * numbers - 1
    return numbers, None if codes.zero_point is None else codes.zero_point.double()


def embedding_reference(module: QuantizedEmbedding, indices: Tensor) -> Tensor:
    """Rows of a table `[R, embedding_dim]` in the module's dtype; one rounding, so kernels must give the same bits."""
    packed, weight_format = module.packed_weight, module.weight_format
    if packed.layout == "rows":
        zero = None if packed.zero_point is None else packed.zero_point[indices]
        part = PackedWeight(
            packed.qweight[indices],
            packed.scale[indices],
            zero,
            "rows",
            (len(indices), packed.shape[1]),
            packed.codebook,
        )
        rows = torch.arange(len(indices))
    else:  # whole panels; columns past the last row of the table repeat it and are not read
        panels, position = torch.unique(indices // PANEL, return_inverse=True)
        columns = (panels[:, None] * PANEL + torch.arange(PANEL)).flatten().clamp(max=packed.shape[0] - 1)
        zero = None if packed.zero_point is None else packed.zero_point[:, columns]
        shape = (len(panels) * PANEL, packed.shape[1])
        part = PackedWeight(packed.qweight[panels], packed.scale[:, columns], zero, "tiles", shape, packed.codebook)
        rows = position * PANEL + indices % PANEL
    codes, zeros = _integers(part, weight_format)
    scale = part.scale if packed.layout == "rows" else part.scale.t()
    group_size = module.group_size
    shifted = codes if zeros is None else codes - zeros.repeat_interleave(group_size, 1)
    return (shifted.float() * scale.float().repeat_interleave(group_size, 1))[rows].to(module.dtype)
