"""pack and unpack: round trips, and the documented layouts re-implemented bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import halfbyte as hb

PLANES = {bits: [plane for plane in (8, 4, 2, 1) if bits & plane] for bits in range(1, 9)}
K_UNIT = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 32, 7: 32, 8: 4}


def random_codes(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1)) if signed else 0
    codes = torch.randint(low, low + (1 << bits), shape, generator=generator)
    return codes.to(torch.int8 if signed else torch.uint8)


def pack_rows_slowly(codes: list[int], bits: int) -> list[int]:
    """One row, as packing.h describes it: plane after plane, element i at bit (i * p) % 8 of byte i * p / 8."""
    packed, shift = [], 0
    for plane in PLANES[bits]:
        data = [0] * ((len(codes) * plane + 7) // 8)
        for i, code in enumerate(codes):
            data[i * plane // 8] |= (code >> shift & ((1 << plane) - 1)) << (i * plane % 8)
        packed += data
        shift += plane
    return packed


def pack_tiles_slowly(codes: list[list[int]], bits: int, group_size: int) -> list[list[int]]:
    """A weight, as packing.h describes it."""
    out_features, in_features = len(codes), len(codes[0])
    panels = []
    for first in range(0, out_features, 16):
        panel: list[int] = []
        for group in range(0, in_features, group_size):
            for unit in range(0, group_size, K_UNIT[bits]):
                shift = 0
                for plane in PLANES[bits]:
                    quads = 8 // plane
                    for row in range(0, K_UNIT[bits], 4 * quads):
                        data = [0] * 64
                        for c in range(16):
                            for t in range(quads):
                                for j in range(4):
                                    inside = unit + row + 4 * t + j
                                    k = group + inside
                                    if first + c < out_features and inside < group_size and k < in_features:
                                        code = codes[first + c][k] >> shift & ((1 << plane) - 1)
                                        data[c * 4 + j] |= code << (plane * t)
                        panel += data
                    shift += plane
        panels.append(panel)
    return panels


def unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.int() + ((1 << (bits - 1)) if codes.dtype == torch.int8 else 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_rows_match_their_description(bits: int, signed: bool) -> None:
    for length in (1, 7, 8, 9, 33):
        codes = random_codes((3, length), bits, signed)
        expected = [pack_rows_slowly(row, bits) for row in unsigned(codes, bits).tolist()]
        assert hb.ops.pack(codes, bits).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_tiles_match_their_description(bits: int, signed: bool) -> None:
    for shape, group_size in (((1, 4), 4), ((16, 32), 32), ((17, 70), 35), ((20, 96), 48), ((3, 10), 4)):
        codes = random_codes(shape, bits, signed)
        expected = pack_tiles_slowly(unsigned(codes, bits).tolist(), bits, group_size)
        assert hb.ops.pack(codes, bits, layout="tiles", group_size=group_size).tolist() == expected


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
def test_rows_round_trip(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    codes = random_codes(tuple(shape), bits, signed, seed)
    packed = hb.ops.pack(codes, bits)
    assert packed.shape == hb.ops.packed_shape(shape, bits)
    assert torch.equal(hb.ops.unpack(packed, bits, shape=shape, signed=signed), codes)


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    rows=st.integers(0, 40),
    columns=st.integers(0, 150),
    group_size=st.one_of(st.none(), st.integers(1, 80)),
    seed=st.integers(0, 2**31),
)
def test_tiles_round_trip(bits: int, signed: bool, rows: int, columns: int, group_size: int | None, seed: int) -> None:
    codes = random_codes((rows, columns), bits, signed, seed)
    packed = hb.ops.pack(codes, bits, layout="tiles", group_size=group_size)
    assert packed.shape == hb.ops.packed_shape((rows, columns), bits, layout="tiles", group_size=group_size)
    unpacked = hb.ops.unpack(packed, bits, shape=(rows, columns), layout="tiles", group_size=group_size, signed=signed)
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_non_contiguous_codes_equal_their_copy(layout: hb.ops.Layout) -> None:
    codes = random_codes((64, 48), 4, True).t()[:, ::2]
    assert torch.equal(hb.ops.pack(codes, 4, layout=layout), hb.ops.pack(codes.contiguous(), 4, layout=layout))
    packed = hb.ops.pack(codes, 4, layout=layout)
    strided = torch.stack([packed, packed], dim=-1)[..., 0]
    unpacked = hb.ops.unpack(strided, 4, shape=codes.shape, layout=layout, signed=True)
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("layout", ["rows", "tiles"])
def test_threads_give_equal_bytes(threads: int, layout: hb.ops.Layout) -> None:
    codes = random_codes((400, 700), 5, True)
    packed = hb.ops.pack(codes, 5, layout=layout, group_size=100 if layout == "tiles" else None)
    torch.set_num_threads(1)
    alone = hb.ops.pack(codes, 5, layout=layout, group_size=100 if layout == "tiles" else None)
    assert torch.equal(packed, alone)


@pytest.mark.parametrize("layout", ["rows", "tiles"])
@pytest.mark.parametrize(("value", "dtype"), [(8, torch.uint8), (255, torch.uint8), (4, torch.int8), (-5, torch.int8)])
def test_codes_that_do_not_fit_are_an_error(layout: hb.ops.Layout, value: int, dtype: torch.dtype) -> None:
    codes = torch.zeros(20, 30, dtype=dtype)
    codes[19, 29] = value
    with pytest.raises(RuntimeError, match="do not fit in bits=3"):
        hb.ops.pack(codes, 3, layout=layout)


def test_compile_and_export() -> None:
    class RoundTrip(torch.nn.Module):
        """Packs and unpacks in both layouts."""

        def forward(self, codes: Tensor) -> Tensor:
            rows = hb.ops.unpack(hb.ops.pack(codes, 3), 3, shape=codes.shape, signed=True)
            tiles = hb.ops.pack(rows, 3, layout="tiles", group_size=20)
            return hb.ops.unpack(tiles, 3, shape=(18, 40), layout="tiles", group_size=20, signed=True)

    codes = random_codes((18, 40), 3, True)
    assert torch.equal(torch.compile(RoundTrip(), fullgraph=True, backend="aot_eager")(codes), codes)
    assert torch.equal(torch.export.export(RoundTrip(), (codes,)).module()(codes), codes)


def test_opcheck() -> None:
    codes = random_codes((18, 40), 3, True)
    ops = torch.ops.halfbyte
    torch.library.opcheck(ops.pack, (codes, 3))
    torch.library.opcheck(ops.unpack, (ops.pack(codes, 3), 3, 40, True))
    torch.library.opcheck(ops.pack_tiles, (codes, 3, 20))
    torch.library.opcheck(ops.unpack_tiles, (ops.pack_tiles(codes, 3, 20), 3, 18, 40, 20, False))


def test_bad_arguments_are_named() -> None:
    codes = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="bits=9 is outside"):
        hb.ops.pack(codes, 9)
    with pytest.raises(TypeError, match=r"bits=2.0 is not an integer"):
        hb.ops.pack(codes, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch.int8 or torch.uint8"):
        hb.ops.pack(codes.float(), 4)
    with pytest.raises(ValueError, match="use 'rows' or 'tiles'"):
        hb.ops.pack(codes, 4, layout="columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes a matrix"):
        hb.ops.pack(codes[0], 4, layout="tiles")
    with pytest.raises(ValueError, match="no dimension to pack"):
        hb.ops.pack(codes[0, 0], 4)
    with pytest.raises(ValueError, match="group_size=0 is not positive"):
        hb.ops.pack(codes, 4, layout="tiles", group_size=0)
    with pytest.raises(ValueError, match=r"packed has shape \(4, 4\)"):
        hb.ops.unpack(hb.ops.pack(codes, 4), 4, shape=(4, 9), signed=True)
