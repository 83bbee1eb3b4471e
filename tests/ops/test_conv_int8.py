"""conv_int8 against float64 convolutions of the same integers, and its int8 results against its float ones step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from quantized_weights import RandomWeight, random_weight
from torch import Tensor

import halfbyte as hb
from halfbyte import functional
from halfbyte._extension import available_capabilities, cpu_capability, set_cpu_capability
from halfbyte.convolution import ConvGeometry


def geometry(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, ...] = 3,
    *,
    dims: int = 2,
    stride: int = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
) -> ConvGeometry:
    return ConvGeometry(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(kernel,) * dims if isinstance(kernel, int) else kernel,
        stride=(stride,) * dims,
        padding=(padding,) * 2 * dims if isinstance(padding, int) else padding,
        dilation=(dilation,) * dims,
        output_padding=(output_padding,) * dims,
        groups=groups,
        transposed=transposed,
    )


def weight_of(g: ConvGeometry, bits: int = 8, **kwargs: Any) -> RandomWeight:
    return random_weight(*g.shape, bits, **kwargs)


def conv(x: Tensor, g: ConvGeometry, w: RandomWeight, bias: Tensor | None = None, **more: Any) -> Tensor:
    return hb.ops.conv_int8(
        x,
        w.qweight,
        w.scale,
        w.zero_point,
        bias,
        out_channels=g.out_channels,
        kernel_size=g.kernel_size,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        groups=g.groups,
        transposed=g.transposed,
        output_padding=g.output_padding,
        bits=w.bits,
        group_size=w.group_size,
        **more,
    )


def sample_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic codes, float64, and the scale of each sample, broadcast over it."""
    codes, scale = functional.quantize_rows_dynamic(x.flatten(1))
    return codes.reshape(x.shape).double(), scale.double().reshape(-1, *(1 for _ in x.shape[1:]))


def reference(x: Tensor, g: ConvGeometry, w: RandomWeight, bias: Tensor | None = None) -> Tensor:
    codes, scale = sample_codes(x)
    y = g.convolve(codes, g.weight_of(w.dense)) * scale
    return y if bias is None else y + bias.double().reshape(-1, *(1 for _ in g.kernel_size))


def expect_close(y: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert y.shape == exact.shape
    error = (y.double() - exact).abs().max().item() if y.numel() else 0.0
    assert error <= tolerance * max(exact.abs().max().item() if y.numel() else 0.0, 1e-6)


CASES = [
    (geometry(16, 32, padding=1), (9, 7)),
    (geometry(3, 32, stride=2, padding=1), (15, 15)),
    (geometry(1, 1), (3, 3)),
    (geometry(5, 7, padding=1), (6, 5)),
    (geometry(64, 24, 1), (8, 8)),
    (geometry(10, 20, 1, stride=2), (7, 9)),
    (geometry(8, 16, padding=2, dilation=2), (9, 9)),
    (geometry(8, 16, (3, 5), stride=2, padding=2, dilation=2), (11, 13)),
    (geometry(8, 16, (2, 4), padding=(0, 1, 1, 2)), (6, 6)),
    (geometry(16, 48, groups=4, padding=1), (5, 5)),
    (geometry(12, 36, groups=3, padding=1), (5, 5)),
    (geometry(64, 64, groups=64, padding=1), (7, 7)),
    (geometry(96, 96, stride=2, groups=96, padding=1), (8, 8)),
    (geometry(20, 20, 5, groups=20, padding=2), (6, 6)),
    (geometry(6, 18, groups=6, padding=1), (6, 6)),
    (geometry(70, 70, 3, groups=70, padding=3, dilation=2), (5, 6)),
    (geometry(16, 16, 7, padding=3), (1, 1)),
    (geometry(40, 64, dims=1, padding=1), (33,)),
    (geometry(129, 16, dims=1, stride=2), (20,)),
    (geometry(24, 24, 5, dims=1, groups=24), (9,)),
    (geometry(4, 8, dims=3, padding=1), (4, 5, 3)),
    (geometry(8, 8, dims=3, groups=8, stride=2, padding=1), (5, 4, 5)),
    (geometry(16, 8, 2, stride=2, transposed=True), (5, 4)),
    (geometry(6, 9, 3, stride=2, padding=1, output_padding=1, transposed=True), (4, 6)),
    (geometry(8, 12, 4, stride=3, dilation=2, groups=4, transposed=True), (4, 3)),
    (geometry(8, 8, 3, groups=8, stride=2, transposed=True), (4, 3)),
    (geometry(16, 4, 3, dims=1, stride=2, transposed=True), (6,)),
    (geometry(4, 4, 2, dims=3, stride=2, transposed=True), (2, 3, 2)),
]


def name_of(case: object) -> str:
    if not isinstance(case, ConvGeometry):
        return str(case)
    return f"{case.description()}{' transposed' if case.transposed else ''}"


@pytest.mark.parametrize(("g", "size"), CASES, ids=name_of)
def test_equals_the_exact_convolution(g: ConvGeometry, size: tuple[int, ...]) -> None:
    w, x, bias = weight_of(g), torch.randn(2, g.in_channels, *size), torch.randn(g.out_channels)
    expect_close(conv(x, g, w, bias), reference(x, g, w, bias))


@pytest.mark.parametrize(("g", "size"), CASES, ids=name_of)
def test_int8_results_are_the_float_ones_requantized(g: ConvGeometry, size: tuple[int, ...]) -> None:
    w, bias = weight_of(g), torch.randn(g.out_channels)
    codes = torch.randint(-128, 128, (3, g.in_channels, *size), dtype=torch.int8)
    act = {"act_scale": torch.tensor(0.013), "act_zero_point": torch.tensor(-7, dtype=torch.int32)}
    y = conv(codes, g, w, bias, **act)
    exact = g.convolve((codes.double() + 7) * torch.tensor(0.013).double(), g.weight_of(w.dense))
    expect_close(y, exact + bias.double().reshape(-1, *(1 for _ in size)))
    out = {"out_scale": y.abs().max() / 100, "out_zero_point": torch.tensor(5, dtype=torch.int32)}
    q = conv(codes, g, w, bias, **act, **out)
    expected = functional.quantize(y, out["out_scale"], out["out_zero_point"], qmin=-128, qmax=127)
    assert q.dtype == torch.int8
    assert torch.equal(q.int(), expected)
    # With a residual, rounded step by step, and a ReLU's bounds.
    residual = torch.randint(-128, 128, y.shape, dtype=torch.int8)
    more = {"residual": residual, "residual_scale": torch.tensor(0.03), "residual_zero_point": torch.tensor(9).int()}
    total = y + functional.dequantize(residual, torch.tensor(0.03), torch.tensor(9))
    expected = functional.quantize(total, out["out_scale"], out["out_zero_point"], qmin=5, qmax=100)
    assert torch.equal(conv(codes, g, w, bias, **act, **out, **more, out_min=5, out_max=100).int(), expected)


# Binary weights have no zero points.
@pytest.mark.parametrize(
    ("bits", "zero_points"), [(b, z) for b in range(1, 9) for z in (False, True) if b > 1 or not z]
)
@pytest.mark.parametrize(
    ("g", "group_size"),
    [
        (geometry(16, 40, padding=1), None),
        (geometry(16, 40, padding=1), 36),
        (geometry(32, 24, 1), 8),
        (geometry(24, 24, groups=24, padding=1), None),
        (geometry(16, 8, groups=2, transposed=True), 24),
    ],
    ids=name_of,
)
def test_every_width(g: ConvGeometry, group_size: int | None, bits: int, zero_points: bool) -> None:
    w = weight_of(g, bits, group_size=group_size, zero_points=zero_points)
    x = torch.randn(2, g.in_channels, 5, 6)
    expect_close(conv(x, g, w), reference(x, g, w))
    act = {"act_scale": torch.tensor(0.03), "act_zero_point": torch.tensor(20, dtype=torch.int32)}
    codes = functional.quantize(x, act["act_scale"], act["act_zero_point"], qmin=-128, qmax=127)
    exact = g.convolve((codes - 20).double() * torch.tensor(0.03).double(), g.weight_of(w.dense))
    expect_close(conv(x, g, w, **act), exact)


@pytest.mark.parametrize(("g", "size"), CASES[:14] + CASES[17:18] + CASES[22:24], ids=name_of)
def test_layouts_and_dtypes(g: ConvGeometry, size: tuple[int, ...]) -> None:
    w, x = weight_of(g), torch.randn(2, g.in_channels, *size)
    y = conv(x, g, w)
    assert y.is_contiguous()
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    of_last = conv(last, g, w)
    assert torch.equal(of_last, y)
    if not last.is_contiguous():
        assert of_last.movedim(1, -1).is_contiguous()
    strided = torch.randn(2, g.in_channels, *size, 2)[..., 0].copy_(x)
    assert torch.equal(conv(strided, g, w), y)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        expected = conv(half.float(), g, w)
        for given in (half, last.to(dtype)):
            got = conv(given, g, w)
            assert got.dtype == dtype
            assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize(("g", "size"), CASES, ids=name_of)
def test_levels_threads_and_batches_give_equal_bits(g: ConvGeometry, size: tuple[int, ...]) -> None:
    w, x = weight_of(g), torch.randn(3, g.in_channels, *size)
    y = conv(x, g, w)
    level, threads = cpu_capability(), torch.get_num_threads()
    try:
        for other in available_capabilities():
            set_cpu_capability(other)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(conv(x, g, w), y)
                assert torch.equal(conv(x[1:2], g, w), y[1:2])
    finally:
        set_cpu_capability(level)
        torch.set_num_threads(threads)


def test_many_inputs_are_summed_in_chunks() -> None:
    g = geometry(4100, 3, 3, padding=1)  # 36,900 inputs: past one chunk of 32,768
    w, x = weight_of(g), torch.randn(1, 4100, 3, 3)
    expect_close(conv(x, g, w), reference(x, g, w))


def test_no_samples() -> None:
    g = geometry(4, 8, padding=1)
    w = weight_of(g)
    assert conv(torch.randn(0, 4, 5, 5), g, w).shape == (0, 8, 5, 5)


def test_values_that_are_not_finite() -> None:
    g = geometry(4, 8)
    w, x = weight_of(g), torch.randn(1, 4, 3, 3)
    zeroed = x.clone()
    x[0, 1, 2, 2], zeroed[0, 1, 2, 2] = torch.nan, 0
    assert torch.equal(conv(x, g, w), conv(zeroed, g, w))
    assert torch.equal(conv(torch.zeros(1, 4, 3, 3), g, w), torch.zeros(1, 8, 1, 1))


@pytest.mark.parametrize(("g", "size"), [CASES[0], CASES[8], CASES[9], CASES[11], CASES[23], CASES[25]], ids=name_of)
def test_gradient_passes_straight_through_the_rounding(g: ConvGeometry, size: tuple[int, ...]) -> None:
    w = weight_of(g)
    x, bias = torch.randn(2, g.in_channels, *size, requires_grad=True), torch.randn(g.out_channels, requires_grad=True)
    y = conv(x, g, w, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    other = x.detach().clone().requires_grad_()
    g.convolve(other, g.weight_of(w.dense.float())).backward(grad)
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 2, 3)))


def arguments(g: ConvGeometry, w: RandomWeight) -> tuple[object, ...]:
    lists = (list(v) for v in (g.kernel_size, g.stride, g.padding, g.dilation, g.output_padding))
    return (
        w.qweight,
        w.scale,
        w.zero_point,
        None,
        w.bits,
        g.out_channels,
        w.group_size,
        *lists,
        g.groups,
        g.transposed,
    )


@pytest.mark.parametrize("kind", ["dynamic", "channels last", "static", "codes"])
def test_opcheck(kind: str) -> None:
    g = geometry(8, 16, stride=2, padding=1)
    x = torch.randn(2, 8, 5, 5, requires_grad=kind in ("dynamic", "channels last"))
    if kind == "channels last":
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    number, zero = torch.tensor(0.02), torch.tensor(3, dtype=torch.int32)
    static = (None, None) if kind in ("dynamic", "channels last") else (number, zero)
    out, residual = (None, None), (None, None, None)
    if kind == "codes":
        x = torch.randint(-128, 128, (2, 8, 5, 5), dtype=torch.int8)
        out = (number, zero)
        residual = (torch.randint(-128, 128, (2, 16, 3, 3), dtype=torch.int8), number, zero)
    op = torch.ops.halfbyte.conv_int8.default
    torch.library.opcheck(op, (x, *arguments(g, weight_of(g)), *static, *out, -128, 127, *residual))


def test_compile_with_dynamic_sizes() -> None:
    g = geometry(8, 16, stride=2, padding=1)
    w = weight_of(g)
    compiled = torch.compile(lambda x: conv(x, g, w).relu(), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 8, 6, 6), (5, 8, 9, 7)):
        x = torch.randn(size)
        assert torch.equal(compiled(x), conv(x, g, w).relu())


def test_weight_only_is_the_convolution_with_the_dequantized_weight() -> None:
    for g, size in CASES:
        w, x = weight_of(g, 4), torch.randn(2, g.in_channels, *size)
        y = hb.ops.conv_weight_only(
            x,
            w.qweight,
            w.scale,
            out_channels=g.out_channels,
            kernel_size=g.kernel_size,
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
            groups=g.groups,
            transposed=g.transposed,
            output_padding=g.output_padding,
            bits=4,
        )
        expect_close(y, g.convolve(x.double(), g.weight_of(w.dense)))


@pytest.mark.parametrize(("g", "size"), CASES, ids=name_of)
def test_rows_times_the_matrix_are_the_convolution(g: ConvGeometry, size: tuple[int, ...]) -> None:
    x, w = torch.randn(2, g.in_channels, *size).double(), torch.randn(g.weight_shape).double()
    assert torch.equal(g.weight_of(g.weight_matrix(w)), w)
    matrix = g.weight_matrix(w).reshape(g.groups, -1, g.shape[1])
    y = (g.rows(x) @ matrix.transpose(1, 2)).reshape(g.groups, 2, -1, g.out_channels // g.groups)
    expected = g.convolve(x, w).flatten(2)
    torch.testing.assert_close(y.permute(1, 0, 3, 2).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(2, 8)}, ValueError, "spatial dimensions"),
        ({"x": torch.randn(2, 8, 5, 5).double()}, TypeError, "x has dtype"),
        ({"x": torch.zeros(2, 8, 5, 5, dtype=torch.int8)}, ValueError, "act_scale"),
        ({"x": torch.randn(2, 8, 1, 5)}, ValueError, "too small"),
        ({"x": torch.randn(2, 7, 5, 5)}, ValueError, "needs"),
        ({"stride": (1, 1, 1)}, ValueError, "stride"),
        ({"groups": 3}, ValueError, "groups=3"),
        ({"group_size": 5}, ValueError, "group_size=5"),
        ({"bias": torch.randn(3)}, ValueError, "bias"),
        ({"out_zero_point": torch.tensor(1, dtype=torch.int32)}, ValueError, "without out_scale"),
        ({"out_min": 3, "out_max": 2}, ValueError, "out_min=3"),
        ({"residual": torch.zeros(2, 16, 3, 3, dtype=torch.int8)}, ValueError, "residual_scale"),
        ({"act_scale": torch.tensor(torch.inf)}, RuntimeError, "not positive and finite"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    w = weight_of(geometry(8, 16))
    arguments = {"x": torch.randn(2, 8, 5, 5), "out_channels": 16, "kernel_size": 3, **change}
    with pytest.raises(error, match=words):
        hb.ops.conv_int8(arguments.pop("x"), w.qweight, w.scale, **arguments)


def test_geometry_survives_json() -> None:
    for g, _ in CASES:
        assert ConvGeometry.from_dict(g.to_dict()) == g
        assert ConvGeometry.from_dict(replace(g, padding_mode="reflect").to_dict()).padding_mode == "reflect"
