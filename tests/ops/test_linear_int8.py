"""linear_int8: exact integers against torch._int_mm and float64, on every ISA level, static and dynamic activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_weights import RandomWeight, assert_accurate, random_weight
from torch import Tensor

import halfbyte as hb
from halfbyte import functional

BITS = range(1, 9)


def linear(x: Tensor, w: RandomWeight, bias: Tensor | None = None, **more: Tensor | bool | None) -> Tensor:
    return hb.ops.linear_int8(x, w.qweight, w.scale, w.zero_point, bias, **w.kwargs, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    out_features=st.integers(1, 150),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 100),
    bits=st.integers(1, 8),
    zero_points=st.booleans(),
    bias=st.booleans(),
)
def test_result_is_that_of_the_codes_in_float64(
    rows: int, out_features: int, groups: int, group_size: int, bits: int, zero_points: bool, bias: bool
) -> None:
    w = random_weight(out_features, groups * group_size, bits, group_size=group_size, zero_points=zero_points)
    x = torch.randn(rows, groups * group_size)
    b = torch.randn(out_features) if bias else None
    codes, scale = functional.quantize_rows_dynamic(x)
    assert_accurate(linear(x, w, b), codes * scale, w.dense, b)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    in_features=st.integers(1, 150),
    bits=st.integers(1, 8),
    zero=st.integers(-128, 127),
    zero_points=st.booleans(),
)
def test_static_activations_with_a_zero_point(
    rows: int, in_features: int, bits: int, zero: int, zero_points: bool
) -> None:
    w = random_weight(37, in_features, bits, zero_points=zero_points)
    x = torch.randn(rows, in_features)
    scale = torch.tensor(0.02)
    codes = torch.clamp(torch.round(x * (1 / scale)) + zero, -128, 127)
    y = linear(x, w, act_scale=scale, act_zero_point=torch.tensor(zero, dtype=torch.int32))
    assert_accurate(y, (codes - zero) * scale, w.dense)


@pytest.mark.parametrize("rows", [17, 64])
def test_integers_are_those_of_int_mm(level: str, rows: int) -> None:
    torch.manual_seed(0)
    a = torch.randint(-127, 128, (rows, 256), dtype=torch.int8)
    a[:, 0] = 127  # so that the dynamic scale of every row is exactly 1
    q = torch.randint(-128, 128, (72, 256), dtype=torch.int8)
    y = hb.ops.linear_int8(a.float(), hb.ops.pack(q, 8, layout="tiles"), torch.ones(1, 72), out_features=72)
    assert torch.equal(y, torch._int_mm(a, q.t().contiguous()).float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features", [2**15 - 1, 2**15, 2**15 + 5])
def test_largest_sums_are_exact(level: str, bits: int, in_features: int) -> None:
    u = torch.full((3, in_features), 2**bits - 1, dtype=torch.uint8)
    zero_point = torch.zeros(1, 3, dtype=torch.uint8)
    qweight = hb.ops.pack(u, bits, layout="tiles")
    for value in (1.0, -1.0):
        x = torch.full((5, in_features), value)
        arguments = {"bits": bits, "out_features": 3, "act_scale": torch.tensor(1 / 127)}
        y = hb.ops.linear_int8(x, qweight, torch.ones(1, 3), zero_point, **arguments)  # type: ignore[arg-type]
        exact = value * 127 * (2**bits - 1) * in_features * (1 / 127)
        torch.testing.assert_close(y, torch.full((5, 3), exact), rtol=3e-7, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_levels_give_equal_bits(level: str, bits: int, zero_points: bool) -> None:
    w = random_weight(70, 256, bits, group_size=64, zero_points=zero_points, scale_dtype=torch.float16)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2))
    y = linear(x, w, bias)
    hb._extension.set_cpu_capability("scalar")
    assert torch.equal(y, linear(x, w, bias))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_row_alone_gives_the_bits_it_has_in_a_batch(level: str, bits: int) -> None:
    w = random_weight(64, 320, bits, group_size=64)
    x = torch.randn(17, 320)
    y = linear(x, w)
    for row in range(17):
        assert torch.equal(linear(x[row], w), y[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    w = random_weight(40, 96, 8)
    x = torch.randn(3, 5, 96).to(dtype)
    y = linear(x, w)
    assert y.dtype == dtype
    assert torch.equal(y, linear(x.float(), w).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    out_features=st.integers(1, 100),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 60),
    bits=st.integers(1, 8),
    zero_points=st.booleans(),
    low=st.sampled_from([-3.0, 0.0, 0.5]),
    bias=st.booleans(),
)
def test_asymmetric_rows_are_those_of_their_codes(
    rows: int, out_features: int, groups: int, group_size: int, bits: int, zero_points: bool, low: float, bias: bool
) -> None:
    w = random_weight(out_features, groups * group_size, bits, group_size=group_size, zero_points=zero_points)
    x = low + torch.rand(rows, groups * group_size) * 3
    b = torch.randn(out_features) if bias else None
    codes, scale = functional.quantize_rows_dynamic(x, symmetric=False)
    assert codes.abs().max() <= 255
    y = linear(x, w, b, asymmetric=True)
    # What the zero point adds is taken off again in float32, so that the error is relative to the larger sums.
    largest = (x.abs().amax() * w.dense.abs().sum(1)).amax() + (0 if b is None else b.abs().amax())
    expected = (codes * scale).double() @ w.dense.double().t() + (0 if b is None else b.double())
    assert (y - expected).abs().max() <= 4e-6 * largest
    assert torch.equal(linear(x[-1:], w, b, asymmetric=True), y[-1:])


def test_asymmetric_rows_use_all_codes_of_one_sided_inputs() -> None:
    w = random_weight(48, 96, 8)
    x = torch.rand(64, 96)
    x[3, 5] = torch.nan
    exact = torch.nan_to_num(x).double() @ w.dense.double().t()
    errors = [(linear(x, w, asymmetric=asymmetric) - exact).norm() for asymmetric in (False, True)]
    assert errors[1] < 0.6 * errors[0]
    assert not linear(torch.zeros(2, 96), w, asymmetric=True).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_asymmetric_rows_are_equal_on_all_levels_and_threads(
    dtype: torch.dtype, restore_level: None, restore_threads: None
) -> None:
    w = random_weight(70, 64, 4, group_size=32, zero_points=True)
    x = torch.randn(9, 64).relu().to(dtype)
    results = []
    for level in hb.available_capabilities():
        hb._extension.set_cpu_capability(level)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(linear(x, w, asymmetric=True))
    assert results[0].dtype == dtype
    assert all(torch.equal(result, results[0]) for result in results)


def test_asymmetric_rows_take_no_scale() -> None:
    with pytest.raises(ValueError, match="finds zero points at run time"):
        linear(torch.randn(2, 64), random_weight(16, 64, 8), act_scale=torch.tensor(0.1), asymmetric=True)


def test_nan_in_a_row_counts_as_zero_and_stays_in_it() -> None:
    w = random_weight(16, 32, 8)
    x = torch.randn(3, 32)
    x[1, 5] = torch.nan
    zeroed = x.clone()
    zeroed[1, 5] = 0
    assert torch.equal(linear(x, w), linear(zeroed, w))


def test_rows_of_zeros_give_the_bias() -> None:
    w = random_weight(16, 32, 8)
    bias = torch.randn(16)
    assert torch.equal(linear(torch.zeros(2, 32), w, bias), bias.expand(2, 16))


def test_int4_name_is_the_same_operator() -> None:
    w = random_weight(32, 64, 4, group_size=32)
    x = torch.randn(3, 64)
    y = hb.ops.linear_int4_int8(x, w.qweight, w.scale, out_features=32, group_size=32)
    assert torch.equal(y, linear(x, w))


def test_gradient_passes_straight_through_the_rounding() -> None:
    w = random_weight(24, 64, 8)
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 24)
    linear(x, w).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ w.dense.float())


@pytest.mark.parametrize("static", [False, True])
def test_opcheck(static: bool) -> None:
    w = random_weight(24, 64, 8, zero_points=True)
    x = torch.randn(3, 64, requires_grad=True)
    qparams = (torch.tensor(0.02), torch.tensor(3, dtype=torch.int32)) if static else (None, None)
    op = torch.ops.halfbyte.linear_int8.default
    torch.library.opcheck(op, (x, w.qweight, w.scale, w.zero_point, None, 8, 24, 64, *qparams))


def test_compile_with_a_dynamic_batch() -> None:
    w = random_weight(24, 64, 8)
    compiled = torch.compile(lambda x: linear(x, w).relu(), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), linear(x, w).relu())


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"act_zero_point": torch.tensor(1, dtype=torch.int32)}, ValueError, "without act_scale"),
        ({"act_scale": torch.ones(2)}, ValueError, "one element"),
        ({"act_scale": torch.tensor(1.0, dtype=torch.float64)}, TypeError, "act_scale has dtype"),
        ({"act_scale": torch.tensor(0.0)}, RuntimeError, "not positive"),
        (
            {"act_scale": torch.tensor(1.0), "act_zero_point": torch.tensor(200, dtype=torch.int32)},
            RuntimeError,
            "act_zero_point=200",
        ),
    ],
)
def test_wrong_activation_qparams_are_named(more: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        linear(torch.randn(2, 64), random_weight(24, 64, 8), **more)
