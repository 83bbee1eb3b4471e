"""A quantized weight matrix: codes packed in one of the two documented layouts, scales, and zero points.

`tiles` holds `[O, I]` weights of matrix products, with `scale` and `zero_point` transposed to `[G, O]`; `rows` holds
tables whose rows are gathered, with `[O, G]`. `cpp/include/halfbyte/packing.h` defines both to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import functional, ops
from halfbyte.formats import CODEBOOK_ENTRIES, CodebookFormat, PackedFormat
from halfbyte.ops import Layout

PANEL = 16  # outputs in one panel of the tiles layout


@dataclass(frozen=True, slots=True)
class WeightCodes:
    """What rounding gives for some rows of a weight.

    Attributes:
        codes: `[O, I]`, int8 for symmetric formats, uint8 for asymmetric ones, for binary (0 is -scale, 1 is +scale) and for
            codebooks.
        scale: `[O, G]` in the format's `scale_dtype`.
        zero_point: `[O, G]` uint8, or None for symmetric formats.
        codebook: `[16]` float32, `CodebookFormat.table()`, or None for integers.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None = None

    def dequantize(self, group_size: int) -> Tensor:
        """`[O, I]` float32."""
        if self.codebook is not None:
            return functional.dequantize_codebook(self.codes, self.scale, self.codebook, group_size=group_size)
        if self.zero_point is None and self.codes.dtype == torch.uint8:  # binary
            signs = self.codes.to(torch.int8).mul_(2).sub_(1)
            return ops.dequantize(signs, self.scale.float(), _zeros(self.scale), group_size=group_size)
        zero = _zeros(self.scale) if self.zero_point is None else self.zero_point.to(torch.int32)
        return ops.dequantize(self.codes, self.scale.float(), zero, group_size=group_size)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as a quantized module holds it.

    Attributes:
        qweight: Packed codes, uint8.
        scale: `[G, O]` for tiles, `[O, G]` for rows.
        zero_point: uint8 of `scale`'s shape, or None.
        layout: Which of the two layouts.
        shape: `(O, I)`.
        codebook: `[16]` float32 values that codes stand for, or None for integers.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    layout: Layout
    shape: tuple[int, int]
    codebook: Tensor | None = None

    def codes(self, weight_format: PackedFormat) -> WeightCodes:
        """The integers and qparams, unpacked."""
        group_size = weight_format.group_size(self.shape[1])
        codes = ops.unpack(
            self.qweight,
            weight_format.bits,
            shape=self.shape,
            layout=self.layout,
            group_size=group_size,
            signed=weight_format.signed and not weight_format.binary,
        )
        if self.layout == "rows":
            return WeightCodes(codes, self.scale, self.zero_point, self.codebook)
        zero_point = None if self.zero_point is None else self.zero_point.t().contiguous()
        return WeightCodes(codes, self.scale.t().contiguous(), zero_point, self.codebook)

    def dequantize(self, weight_format: PackedFormat) -> Tensor:
        """`[O, I]` float32: exactly the numbers that the kernels multiply with."""
        return self.codes(weight_format).dequantize(weight_format.group_size(self.shape[1]))

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by buffer name."""
        return {
            "qweight": self.qweight,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "codebook": self.codebook,
        }


class WeightPacker:
    """Packs a weight whose integers come some rows at a time, into tensors that are allocated once.

    Args:
        weight_format: Format of the weight.
        layout: Layout to pack into.
        shape: `(O, I)` of the whole weight.
    """

    def __init__(self, weight_format: PackedFormat, layout: Layout, shape: tuple[int, int]) -> None:
        self._format, self._layout, self._shape = weight_format, layout, shape
        shapes = packed_shapes(weight_format, layout, shape)
        self._tensors = {name: ops.empty_packed(size, dtype) for name, (size, dtype) in shapes.items()}
        if isinstance(weight_format, CodebookFormat):
            self._tensors["codebook"] = weight_format.table()
        self._rows = 0

    def add(self, part: WeightCodes) -> None:
        """The next rows; every part but the last has a multiple of 16."""
        begin, end = self._rows, self._rows + part.codes.shape[0]
        tiles = self._layout == "tiles"
        group_size = self._format.group_size(self._shape[1])
        packed = ops.pack(part.codes, self._format.bits, layout=self._layout, group_size=group_size)
        first = begin // PANEL if tiles else begin
        self._tensors["qweight"][first : first + packed.shape[0]] = packed
        for name, values in (("scale", part.scale), ("zero_point", part.zero_point)):
            if values is not None and tiles:
                self._tensors[name][:, begin:end] = values.t()
            elif values is not None:
                self._tensors[name][begin:end] = values
        self._rows = end

    def packed(self) -> PackedWeight:
        """The whole weight, once all rows are in."""
        assert self._rows == self._shape[0]
        tensors = self._tensors
        return PackedWeight(
            tensors["qweight"],
            tensors["scale"],
            tensors.get("zero_point"),
            self._layout,
            self._shape,
            tensors.get("codebook"),
        )


def packed_shapes(
    weight_format: PackedFormat, layout: Layout, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a packed weight of `shape` `(O, I)`: what a file must hold."""
    out_features, in_features = shape
    bits, group_size = weight_format.bits, weight_format.group_size(in_features)
    groups = in_features // group_size if in_features else 0
    q_shape = ops.packed_shape(shape, bits, layout=layout, group_size=group_size)
    s_shape = (groups, out_features) if layout == "tiles" else (out_features, groups)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": (q_shape, torch.uint8),
        "scale": (s_shape, weight_format.scale_dtype),
    }
    if not weight_format.symmetric:
        shapes["zero_point"] = (s_shape, torch.uint8)
    if isinstance(weight_format, CodebookFormat):
        shapes["codebook"] = ((CODEBOOK_ENTRIES,), torch.float32)
    return shapes


def packed_bytes(weight_format: PackedFormat, layout: Layout, shape: tuple[int, int]) -> int:
    """Bytes of codes, scales, zero points and codebook, padding included."""
    return sum(
        torch.Size(s).numel() * dtype.itemsize for s, dtype in packed_shapes(weight_format, layout, shape).values()
    )


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(scale.shape, dtype=torch.int32)
