"""linear_weight_only against float64, on every ISA level, with autograd, compile and export."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_weights import RandomWeight, assert_accurate, random_weight
from torch import Tensor

import halfbyte as hb

BITS = range(1, 9)


def linear(x: Tensor, w: RandomWeight, bias: Tensor | None = None) -> Tensor:
    return hb.ops.linear_weight_only(x, w.qweight, w.scale, w.zero_point, bias, **w.kwargs)


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
def test_result_is_that_of_float64(
    rows: int, out_features: int, groups: int, group_size: int, bits: int, zero_points: bool, bias: bool
) -> None:
    w = random_weight(out_features, groups * group_size, bits, group_size=group_size, zero_points=zero_points)
    x = torch.randn(rows, groups * group_size)
    b = torch.randn(out_features) if bias else None
    assert_accurate(linear(x, w, b), x, w.dense, b, tolerance=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", [False, True])
def test_levels_give_equal_bits(level: str, bits: int, zero_points: bool) -> None:
    w = random_weight(70, 256, bits, group_size=64, zero_points=zero_points)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(1))
    y = linear(x, w)
    hb._extension.set_cpu_capability("scalar")
    assert torch.equal(y, linear(x, w))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_row_alone_gives_the_bits_it_has_in_a_batch(level: str, bits: int) -> None:
    w = random_weight(64, 320, bits, group_size=64)
    x = torch.randn(17, 320)
    y = linear(x, w)
    for row in range(17):
        assert torch.equal(linear(x[row], w), y[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    w = random_weight(40, 96, 4, group_size=32)
    x = torch.randn(3, 5, 96).to(dtype)
    bias = torch.randn(40).to(dtype)
    y = linear(x, w, bias)
    assert y.dtype == dtype and y.shape == (3, 5, 40)
    assert torch.equal(y, linear(x.float(), w, bias).to(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_every_float_type_are_read(scale_dtype: torch.dtype) -> None:
    w = random_weight(33, 64, 4, group_size=16, scale_dtype=scale_dtype)
    x = torch.randn(2, 64)
    assert_accurate(linear(x, w), x, w.dense, tolerance=2e-6)


def test_non_contiguous_operands_are_read_as_they_stand() -> None:
    w = random_weight(48, 64, 4, group_size=32, zero_points=True)
    x = torch.randn(64, 6).t()
    scale = w.scale.t().contiguous().t()
    assert not x.is_contiguous() and not scale.is_contiguous()
    y = hb.ops.linear_weight_only(x, w.qweight, scale, w.zero_point, **w.kwargs)
    assert torch.equal(y, linear(x.contiguous(), w))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    w = random_weight(20, 32, 4)
    assert linear(torch.empty(shape), w).shape == (*shape[:-1], 20)


def test_no_outputs_and_no_inputs() -> None:
    assert linear(torch.randn(3, 32), random_weight(0, 32, 4)).shape == (3, 0)
    bias = torch.randn(5)
    assert torch.equal(linear(torch.empty(2, 0), random_weight(5, 0, 8), bias), bias.expand(2, 5))


def test_gradients_are_those_of_the_dequantized_weight() -> None:
    w = random_weight(24, 64, 4, group_size=32, zero_points=True)
    x = torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    grad = torch.randn(3, 24)
    linear(x, w, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ w.dense.float())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize(("bits", "group"), [(1, None), (3, 12)])
def test_gradients_of_binary_weights_and_padded_groups(bits: int, group: int | None) -> None:
    w = random_weight(17, 48, bits, group_size=group)
    x = torch.randn(2, 48, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.dense.float().sum(0).expand(2, 48))


def test_opcheck() -> None:
    w = random_weight(24, 64, 4, group_size=32)
    x = torch.randn(3, 64, requires_grad=True)
    op = torch.ops.halfbyte.linear_weight_only.default
    torch.library.opcheck(op, (x, w.qweight, w.scale, None, torch.randn(24), 4, 24, 32))


class Layer(torch.nn.Module):
    def __init__(self, w: RandomWeight) -> None:
        super().__init__()
        self.w = w
        self.register_buffer("qweight", w.qweight)
        self.register_buffer("scale", w.scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(hb.ops.linear_weight_only(x, self.qweight, self.scale, **self.w.kwargs))


def test_compile_and_export_with_a_dynamic_batch() -> None:
    layer = Layer(random_weight(24, 64, 4, group_size=32))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(
        layer, (torch.randn(3, 64),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    ).module()
    for rows in (3, 5, 11):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(exported(x), layer(x))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x": torch.randn(2, 63)},
            ValueError,
            "x has 63 features in its last dimension; the weight takes in_features=64",
        ),
        ({"x": torch.randn(2, 96)}, ValueError, "qweight has shape"),
        ({"x": torch.ones(2, 64, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimensions"),
        ({"scale": torch.ones(24, 2)}, ValueError, "groups, out_features"),
        ({"zero_point": torch.ones(2, 24)}, TypeError, "zero_point has dtype"),
        ({"bias": torch.ones(23)}, ValueError, "bias has shape"),
        ({"bits": 9}, ValueError, "bits=9"),
        ({"group_size": 0}, ValueError, "group_size=0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    w = random_weight(24, 64, 4, group_size=32)
    arguments = {"x": torch.randn(2, 64), "qweight": w.qweight, "scale": w.scale, **w.kwargs, **change}
    with pytest.raises(error, match=words):
        hb.ops.linear_weight_only(**arguments)  # type: ignore[arg-type]


def test_operator_itself_refuses_a_weight_of_another_shape() -> None:
    w = random_weight(24, 64, 4, group_size=32)
    with pytest.raises(RuntimeError, match="qweight must have shape"):
        torch.ops.halfbyte.linear_weight_only(torch.randn(2, 128), w.qweight, w.scale, None, None, 4, 24, 32)
