"""Operators with a codebook against float64 and plain torch, on every ISA level, with autograd and compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_weights import assert_accurate
from torch import Tensor

import halfbyte as hb
from halfbyte import functional, ops
from halfbyte.algorithms import MSE, RTN
from halfbyte.formats import FP4_VALUES, NF4_VALUES, CodebookFormat, PerAxis, PerGroup
from halfbyte.nn.packed_weight import PackedWeight, WeightPacker
from halfbyte.ops import Layout

OWN = (-2.5, -0.75, -0.1, 0.4, 1.75)  # five values, 3 bits, no zero


def formats(group_size: int, scale_dtype: torch.dtype = torch.float32) -> list[CodebookFormat]:
    codebooks = [NF4_VALUES, FP4_VALUES, OWN, (-1.0, 0.0, 0.5), (-0.5, 1.0)]
    return [CodebookFormat(values, PerGroup(group_size), scale_dtype) for values in codebooks]


def packed(weight: Tensor, fmt: CodebookFormat, layout: Layout = "tiles") -> tuple[PackedWeight, Tensor]:
    """A packed weight and what it stands for, in float64, from codes that plain torch chose."""
    group_size = fmt.group_size(weight.shape[1])
    groups = weight.reshape(weight.shape[0], -1, group_size)
    scale = (groups.abs().amax(-1) / fmt.reach).to(fmt.scale_dtype)
    values = torch.tensor(fmt.values)
    nearest = ((groups / scale.float().unsqueeze(-1)).unsqueeze(-1) - values).abs().argmin(-1).reshape(weight.shape)
    packer = WeightPacker(fmt, layout, (weight.shape[0], weight.shape[1]))
    packer.add(hb.nn.packed_weight.WeightCodes(nearest.to(torch.uint8), scale, None, fmt.table()))
    return packer.packed(), values.double()[nearest] * scale.double().repeat_interleave(group_size, 1)


def linear(x: Tensor, w: PackedWeight, fmt: CodebookFormat, bias: Tensor | None = None) -> Tensor:
    out_features, in_features = w.shape
    return ops.linear_weight_only(
        x,
        w.qweight,
        w.scale,
        None,
        bias,
        bits=fmt.bits,
        out_features=out_features,
        group_size=fmt.group_size(in_features),
        codebook=w.codebook,
    )


@settings(max_examples=40, deadline=None)
@given(
    which=st.integers(0, 4),
    rows=st.integers(1, 12),
    out_features=st.integers(1, 70),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 70),
    scale_dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    bias=st.booleans(),
)
def test_linear_is_that_of_float64(
    which: int, rows: int, out_features: int, groups: int, group_size: int, scale_dtype: torch.dtype, bias: bool
) -> None:
    fmt = formats(group_size, scale_dtype)[which]
    w, dense = packed(torch.randn(out_features, groups * group_size), fmt)
    x = torch.randn(rows, groups * group_size)
    b = torch.randn(out_features) if bias else None
    assert_accurate(linear(x, w, fmt, b), x, dense, b, tolerance=1e-5)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_levels_give_equal_bits(level: str, which: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    fmt = formats(32)[which]
    w, _ = packed(torch.randn(70, 256, generator=generator), fmt)
    x = torch.randn(rows, 256, generator=generator)
    y = linear(x, w, fmt)
    hb._extension.set_cpu_capability("scalar")
    assert torch.equal(y, linear(x, w, fmt))


def test_integers_as_a_codebook_give_the_bits_of_integers() -> None:
    codes = torch.randint(0, 16, (40, 96), dtype=torch.uint8)
    scale, x = torch.rand(3, 40) * 0.1, torch.randn(5, 96)
    arguments = {"bits": 4, "out_features": 40, "group_size": 32}
    as_values = ops.linear_weight_only(
        x,
        ops.pack(codes, 4, layout="tiles", group_size=32),
        scale,
        codebook=torch.arange(-8.0, 8.0),
        **arguments,  # type: ignore[arg-type]
    )
    signed = (codes.to(torch.int16) - 8).to(torch.int8)
    as_integers = ops.linear_weight_only(x, ops.pack(signed, 4, layout="tiles", group_size=32), scale, **arguments)  # type: ignore[arg-type]
    assert torch.equal(as_values, as_integers)


@pytest.mark.parametrize("layout", ["rows", "tiles"])
@pytest.mark.parametrize("which", range(5))
def test_tables_are_read_through_the_codebook(which: int, layout: Layout) -> None:
    fmt = formats(16)[which]
    w, dense = packed(torch.randn(37, 48), fmt, layout)
    table = dense.float()  # one product in float32
    arguments = {
        "bits": fmt.bits,
        "num_embeddings": 37,
        "embedding_dim": 48,
        "group_size": 16,
        "tiled": layout == "tiles",
    }
    indices = torch.tensor([36, 0, 5, 5])
    rows = ops.embedding_weight_only(indices, w.qweight, w.scale, codebook=w.codebook, **arguments)  # type: ignore[arg-type]
    assert torch.equal(rows, table[indices])
    offsets = torch.tensor([0, 1, 1])
    for mode in ("sum", "mean", "max"):
        bags = ops.embedding_bag_weight_only(
            indices,
            offsets,
            w.qweight,
            w.scale,
            codebook=w.codebook,
            mode=mode,
            **arguments,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(bags, torch.nn.functional.embedding_bag(indices, table, offsets, mode=mode))


def test_gradient_is_that_of_the_dequantized_weight_and_opcheck_passes() -> None:
    fmt = formats(32)[0]
    w, dense = packed(torch.randn(24, 64), fmt)
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 24)
    linear(x, w, fmt).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ dense.float())
    op = torch.ops.halfbyte.linear_weight_only.default
    torch.library.opcheck(op, (x, w.qweight, w.scale, None, torch.randn(24), 4, 24, 32, w.codebook))
    search = torch.ops.halfbyte.search_qparams.default
    torch.library.opcheck(search, (dense.float(), None, 4, True, False, 32, 5, 0.5, torch.float16, fmt.entries()))


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_absmax_rounding_takes_the_nearest_value(level: str, which: int, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(which)
    fmt, weight = formats(32, scale_dtype)[which], torch.randn(20, 64)
    rounded = RTN().round(weight, fmt, None)
    scale = (weight.reshape(20, 2, 32).abs().amax(-1) / fmt.reach).to(scale_dtype)
    assert torch.equal(rounded.scale, scale)
    ours = (rounded.dequantize(32) - weight).abs()
    per_weight = scale.float().repeat_interleave(32, 1).unsqueeze(-1)
    best = (per_weight * torch.tensor(fmt.values) - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scale_loses_least_of_a_search_in_torch(which: int, weighted: bool) -> None:
    torch.manual_seed(which)
    fmt, weight = formats(32)[which], torch.randn(10, 64)
    importance = torch.rand(64) if weighted else None
    scale, zero_point, loss = ops.search_qparams(
        weight, importance, bits=4, symmetric=True, group_size=32, grid=20, max_shrink=0.6, codebook=fmt.entries()
    )
    groups = weight.reshape(10, 2, 32).double()
    factors = (torch.ones(64) if importance is None else importance).reshape(2, 32).double()

    def loss_of(scale: Tensor) -> Tensor:
        values = torch.tensor(fmt.values).double() * scale.double()[..., None, None]
        return ((values - groups[..., None]).square().amin(-1) * factors).sum(-1)

    torch.testing.assert_close(loss.double(), loss_of(scale), rtol=1e-5, atol=1e-12)
    base = groups.abs().amax(-1) / fmt.reach
    tried = torch.stack([loss_of(base * (1 - j * 0.6 / 20)) for j in range(20)]).amin(0)
    assert (loss <= tried * (1 + 1e-5)).all()
    assert not zero_point.any()


def test_searched_scale_loses_less_than_absmax_and_levels_agree(level: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    for fmt in formats(64, torch.float16):
        searched, plain = MSE().round(weight, fmt, None), RTN().round(weight, fmt, None)
        error = [(r.dequantize(64) - weight).square().sum() for r in (searched, plain)]
        assert error[0] < error[1]
        hb._extension.set_cpu_capability("scalar")
        again = MSE().round(weight, fmt, None)
        hb._extension.set_cpu_capability(level)
        assert torch.equal(searched.scale, again.scale) and torch.equal(searched.codes, again.codes)


def test_a_group_of_zeros_is_rounded_to_zero_or_the_smallest_value() -> None:
    zeros = torch.zeros(16, 32)
    with_zero = RTN().round(zeros, CodebookFormat(NF4_VALUES, PerAxis(0)), None)
    assert (with_zero.scale == 1).all() and not with_zero.dequantize(32).any()
    without = MSE().round(zeros, CodebookFormat(OWN, PerAxis(0)), None)
    assert without.dequantize(32).abs().max() < 1e-37


@pytest.mark.parametrize("scales", ["searched", "given"])
def test_gptq_with_an_identity_hessian_is_rounding_to_nearest(level: str, scales: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 64)
    for fmt in formats(32):
        entries = fmt.entries()
        expected, zero_point, _ = ops.search_qparams(weight, bits=4, symmetric=True, group_size=32, codebook=entries)
        given = {} if scales == "searched" else {"scale": expected, "zero_point": zero_point}
        codes, scale, _, loss = ops.gptq_round(
            weight, torch.eye(64), bits=fmt.bits, symmetric=True, group_size=32, grid=100, codebook=entries, **given
        )
        if scales == "given":
            assert torch.equal(scale, expected)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes, functional.quantize_codebook(weight, scale, entries, group_size=32))
        error = functional.dequantize_codebook(codes, scale, entries, group_size=32) - weight
        torch.testing.assert_close(loss, error.square().sum(1))


def test_gptq_loses_less_than_nearest_rounding_of_correlated_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 64) @ torch.randn(64, 64)
    hessian = (x.t() @ x + 0.01 * torch.eye(64) * x.square().sum() / 64).double()
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).float()
    weight, entries = torch.randn(48, 64), torch.tensor(NF4_VALUES)
    codes, scale, _, _ = ops.gptq_round(weight, factor, bits=4, symmetric=True, group_size=32, grid=1, codebook=entries)
    nearest_scale, _, _ = ops.search_qparams(weight, bits=4, symmetric=True, group_size=32, grid=1, codebook=entries)
    nearest = functional.quantize_codebook(weight, nearest_scale, entries, group_size=32)

    def loss(codes: Tensor, scale: Tensor) -> Tensor:
        error = functional.dequantize_codebook(codes, scale, entries, group_size=32) - weight
        return (x @ error.t()).square().sum()

    assert loss(codes, scale) < 0.7 * loss(nearest, nearest_scale)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codebook": torch.zeros(15)}, ValueError, "codebook has shape"),
        ({"codebook": torch.zeros(16, dtype=torch.float64)}, TypeError, "codebook has dtype"),
        ({"zero_point": torch.zeros(2, 24, dtype=torch.uint8)}, ValueError, "no zero_point"),
    ],
)
def test_wrong_codebooks_are_named(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    w, _ = packed(torch.randn(24, 64), formats(32)[0])
    arguments = {"qweight": w.qweight, "scale": w.scale, "codebook": w.codebook, **change}
    with pytest.raises(error, match=words):
        ops.linear_weight_only(torch.randn(2, 64), bits=4, out_features=24, group_size=32, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[1.0, 0.0], [0.0, 0.0], [0.0, float("nan")], [0.0], [float(n) for n in range(17)]])
def test_entries_that_cannot_be_rounded_to_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="codebook"):
        ops.search_qparams(torch.randn(2, 8), bits=4, symmetric=True, codebook=torch.tensor(values))
    with pytest.raises(RuntimeError, match="codebook"):
        torch.ops.halfbyte.search_qparams(
            torch.randn(2, 8), None, 4, True, False, 8, 1, 0.0, torch.float32, torch.tensor(values)
        )
