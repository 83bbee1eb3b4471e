"""Codes of 1 to 8 bits packed without straddling bytes; `packing.h` documents both layouts.

`"rows"` packs the last dimension on its own (embeddings, storage); `"tiles"` is what the matrix products read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.checks import check_bits, check_codes

__all__ = ["empty_packed", "pack", "unpack"]

_pack = torch.ops.halfbyte.pack.default
_unpack = torch.ops.halfbyte.unpack.default
_advise_huge_pages = torch.ops.halfbyte.advise_huge_pages_.default
_pack_tiles = torch.ops.halfbyte.pack_tiles.default
_unpack_tiles = torch.ops.halfbyte.unpack_tiles.default

Layout = Literal["rows", "tiles"]

_PANEL = 16  # outputs in a panel of the tiles layout
_LARGE = 2 << 20  # bytes from which huge pages are asked for


def empty_packed(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU for a packed weight: if it is large, its memory is asked for in huge pages.

    Rows of a table that are read at random would each cost a walk through the page table otherwise.

    Args:
        size: Shape.
        dtype: dtype.

    Returns:
        An uninitialised tensor.

    Example:
        >>> hb.ops.empty_packed((3, 64), torch.uint8).shape
        torch.Size([3, 64])
    """
    tensor = torch.empty(size, dtype=dtype)
    if tensor.nbytes >= _LARGE and tensor.device.type == "cpu":
        _advise_huge_pages(tensor)
    return tensor


def pack(codes: Tensor, bits: int, *, layout: Layout = "rows", group_size: int | None = None) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: int8 holds signed codes in `[-2**(bits-1), 2**(bits-1) - 1]`, uint8 unsigned ones in `[0, 2**bits - 1]`. Rows:
            `[..., L]` with at least one dimension. Tiles: `[O, I]`.
        bits: 1 to 8.
        layout: `"rows"` or `"tiles"`.
        group_size: Tiles only: inputs that share a scale, padded to whole units; None: all of a row.

    Returns:
        uint8. Rows: `[..., bytes of a row]`. Tiles: `[ceil(O / 16), bytes of a panel]`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Bits or shape do not fit.
        RuntimeError: A code does not fit in `bits`.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.pack(torch.tensor([1, -8, 7], dtype=torch.int8), 4)
        tensor([ 9, 15], dtype=torch.uint8)
    """
    check_codes(codes, "codes", (torch.int8, torch.uint8))
    check_bits(bits)
    packed: Tensor
    if _is_tiles(layout):
        if codes.dim() != 2:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; layout='tiles' takes a matrix [O, I]")
        packed = _pack_tiles(codes, bits, _tile_group(group_size, codes.shape[1]))
        return packed
    if codes.dim() == 0:
        raise ValueError("codes have no dimension to pack; codes.reshape(1) gives them one")
    packed = _pack(codes, bits)
    return packed


def unpack(
    packed: Tensor,
    bits: int,
    *,
    shape: Sequence[int],
    layout: Layout = "rows",
    group_size: int | None = None,
    signed: bool,
) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: What `pack` returned, uint8.
        bits: 1 to 8.
        shape: Shape of the codes.
        layout: `"rows"` or `"tiles"`.
        group_size: As given to `pack`.
        signed: Whether the codes were int8.

    Returns:
        int8 if `signed`, else uint8, of shape `shape`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `packed` does not have the shape that `pack` gives for `shape`, `bits` and `group_size`.

    Example:
        >>> import torch, halfbyte as hb
        >>> hb.ops.unpack(torch.tensor([9, 15], dtype=torch.uint8), 4, shape=(3,), signed=True)
        tensor([ 1, -8,  7], dtype=torch.int8)
    """
    check_codes(packed, "packed", (torch.uint8,))
    check_bits(bits)
    shape = tuple(shape)
    expected = packed_shape(shape, bits, layout=layout, group_size=group_size)
    if packed.shape != expected:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; codes of shape {shape} with bits={bits}, layout={layout!r}, "
            f"group_size={group_size} take {expected}"
        )
    codes: Tensor
    if _is_tiles(layout):
        codes = _unpack_tiles(packed, bits, shape[0], shape[1], _tile_group(group_size, shape[1]), signed)
        return codes
    codes = _unpack(packed, bits, shape[-1], signed)
    return codes


def packed_shape(
    shape: Sequence[int], bits: int, *, layout: Layout = "rows", group_size: int | None = None
) -> tuple[int, ...]:
    """The shape that packed codes of `shape` have; arguments as in `pack`.

    Example:
        >>> import halfbyte as hb
        >>> hb.ops.packed_shape((100, 64), 4, layout="tiles", group_size=32)
        (7, 512)
    """
    check_bits(bits)
    if _is_tiles(layout):
        if len(shape) != 2:
            raise ValueError(f"shape={tuple(shape)} is not that of a matrix [O, I], which layout='tiles' needs")
        out_features, in_features = shape
        group = _tile_group(group_size, in_features)
        unit = unit_inputs(bits)
        padded = -(-in_features // group) * (-(-group // unit) * unit)
        return (-(-out_features // _PANEL), padded * _PANEL * bits // 8)
    if not shape:
        raise ValueError("shape=() has no dimension to pack")
    row_bytes = sum(-(-shape[-1] * plane // 8) for plane in (8, 4, 2, 1) if bits & plane)
    return (*shape[:-1], row_bytes)


def unit_inputs(bits: int) -> int:
    """Inputs in one unit of the tiles layout: `k_unit()` of packing.h."""
    return {8: 4, 4: 8, 2: 16}.get(bits, 32)


def _is_tiles(layout: Layout) -> bool:
    if layout not in ("rows", "tiles"):
        raise ValueError(f"layout={layout!r} is unknown; use 'rows' or 'tiles'")
    return layout == "tiles"


def _tile_group(group_size: int | None, in_features: int) -> int:
    if group_size is None:
        return max(in_features, 1)
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is not positive; use None for all of a row")
    return group_size


def _pack_fake(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(packed_shape(codes.shape, bits), dtype=torch.uint8)


def _unpack_fake(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], length), dtype=torch.int8 if signed else torch.uint8)


def _pack_tiles_fake(codes: Tensor, bits: int, group_size: int) -> Tensor:
    shape = packed_shape(codes.shape, bits, layout="tiles", group_size=group_size)
    return codes.new_empty(shape, dtype=torch.uint8)


def _unpack_tiles_fake(
    packed: Tensor, bits: int, out_features: int, in_features: int, group_size: int, signed: bool
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=torch.int8 if signed else torch.uint8)


torch.library.register_fake("halfbyte::pack", _pack_fake)
torch.library.register_fake("halfbyte::unpack", _unpack_fake)
torch.library.register_fake("halfbyte::pack_tiles", _pack_tiles_fake)
torch.library.register_fake("halfbyte::unpack_tiles", _unpack_tiles_fake)
