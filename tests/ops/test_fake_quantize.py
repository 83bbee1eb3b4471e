"""fake_quantize against PyTorch's own operators, bit for bit, on every ISA level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import halfbyte as hb

SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (63,), (65,), (3, 0), (5, 33), (2, 3, 4, 5), (1000,)]
SPECIALS = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 0.05, -0.05, 0.15, 1e-40])


def qparams(channels: int, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(channels) * 0.2 + 0.01
    return scale, torch.randint(qmin, qmax + 1, (channels,), dtype=torch.int32)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Also tells -0 from +0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def with_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(y.dtype)
    y.backward(grad)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (0, 255), (-8, 7)])
def test_per_tensor_equals_torch(level: str, shape: tuple[int, ...], qmin: int, qmax: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 10
    scale, zero_point = torch.tensor(0.07), torch.tensor((qmin + qmax + 1) // 2, dtype=torch.int32)
    ours = with_gradient(lambda v: hb.ops.fake_quantize(v, scale, zero_point, qmin=qmin, qmax=qmax), x)
    theirs = with_gradient(lambda v: torch.fake_quantize_per_tensor_affine(v, scale, zero_point, qmin, qmax), x)
    assert equal_bits(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("shape", [(1, 1), (4, 3, 3, 3), (16, 5), (17, 31), (3, 64), (40, 33), (2, 7, 50)], ids=str)
@pytest.mark.parametrize("from_end", [False, True])
def test_every_axis_equals_torch(level: str, shape: tuple[int, ...], from_end: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape) * 10
    for axis in range(x.dim()):
        scale, zero_point = qparams(shape[axis], -128, 127)
        given_axis = axis - x.dim() if from_end else axis
        ours = with_gradient(
            lambda v, s=scale, z=zero_point, a=given_axis: hb.ops.fake_quantize(v, s, z, qmin=-128, qmax=127, axis=a), x
        )
        theirs = with_gradient(
            lambda v, s=scale, z=zero_point, a=axis: torch.fake_quantize_per_channel_affine(v, s, z, a, -128, 127), x
        )
        assert equal_bits(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("group_size", [1, 2, 4, 15, 16, 17, 32, 48])
def test_per_group_equals_torch_per_channel_of_the_groups(level: str, group_size: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 4, 2 * group_size) * 10
    scale, zero_point = qparams(24, 0, 15)
    shape = (3, 4, 2)
    ours = with_gradient(
        lambda v: hb.ops.fake_quantize(
            v, scale.reshape(shape), zero_point.reshape(shape), qmin=0, qmax=15, group_size=group_size
        ),
        x,
    )
    theirs = with_gradient(
        lambda v: torch.fake_quantize_per_channel_affine(v, scale, zero_point, 0, 0, 15), x.reshape(24, group_size)
    )
    assert equal_bits(ours[0], theirs[0].reshape(x.shape))
    assert torch.equal(ours[1], theirs[1].reshape(x.shape))


@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (2, 0, 3)], ids=str)
def test_empty_input_gives_empty_output(level: str, shape: tuple[int, ...]) -> None:
    for axis in (0, 1, None):
        count = 1 if axis is None else shape[axis]
        y, grad = with_gradient(
            lambda v, a=axis, n=count: hb.ops.fake_quantize(
                v, torch.ones(n), torch.zeros(n, dtype=torch.int32), qmin=-8, qmax=7, axis=a
            ),
            torch.zeros(shape),
        )
        assert y.shape == grad.shape == shape


def test_per_token_is_a_group_as_long_as_the_row() -> None:
    x = torch.randn(6, 40)
    scale, zero_point = qparams(6, -128, 127)
    token = hb.ops.fake_quantize(x, scale[:, None], zero_point[:, None], qmin=-128, qmax=127, group_size=x.shape[-1])
    assert torch.equal(token, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -128, 127))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_compute_in_float32_and_round_once(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = (torch.randn(37, 45) * 10).to(dtype)
    for axis, count in ((0, 37), (1, 45)):
        scale, zero_point = qparams(count, -128, 127)
        y, grad = with_gradient(
            lambda v, s=scale, z=zero_point, a=axis: hb.ops.fake_quantize(v, s, z, qmin=-128, qmax=127, axis=a), x
        )
        wide, _ = with_gradient(
            lambda v, s=scale, z=zero_point, a=axis: torch.fake_quantize_per_channel_affine(v, s, z, a, -128, 127),
            x.float(),
        )
        assert y.dtype == dtype and grad.dtype == dtype
        assert equal_bits(y, wide.to(dtype))


def test_special_values(level: str) -> None:
    x = SPECIALS.repeat(7)
    y, grad = with_gradient(lambda v: hb.ops.fake_quantize(v, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7), x)
    expected = torch.tensor([math.nan, 7, -8, 0, 0, 7, -8, 0, 0, 2, 0]) * torch.tensor(0.1)
    assert torch.equal(y.isnan(), x.isnan())
    finite = ~x.isnan()
    # 0.05 * (1 / 0.1) is a tie that goes to the even code 0; 0.15 * (1 / 0.1) lies past one.
    assert equal_bits(y[finite], expected.repeat(7)[finite])
    inside = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool).repeat(7)
    assert not grad[~inside].any()
    assert torch.equal(grad[inside], torch.linspace(-1, 1, x.numel())[inside])


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    bits=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_axis_equals_torch(shape: list[int], data: st.DataObject, bits: int, seed: int) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = -(1 << bits - 1), (1 << bits - 1) - 1
    x = torch.randn(shape, generator=generator) * 2 ** (bits - 1) * 0.2
    scale = torch.rand(shape[axis], generator=generator) + 0.01
    zero_point = torch.randint(qmin, qmax + 1, (shape[axis],), generator=generator, dtype=torch.int32)
    ours = hb.ops.fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis)
    assert equal_bits(ours, torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, qmin, qmax))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::3],
        lambda x: x[1:, 5:],
        lambda x: x.t().unsqueeze(0).expand(3, -1, -1),
        lambda x: x.reshape(2, 3, 4, 40).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "offset", "expanded", "channels_last"],
)
def test_non_contiguous_input_equals_its_copy(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(24, 40))
    scale, zero_point = qparams(x.shape[1], -8, 7)
    y = hb.ops.fake_quantize(x, scale, zero_point, qmin=-8, qmax=7, axis=1)
    assert y.is_contiguous()
    assert torch.equal(y, hb.ops.fake_quantize(x.contiguous(), scale, zero_point, qmin=-8, qmax=7, axis=1))


def test_non_contiguous_gradient_equals_its_copy() -> None:
    x = torch.randn(40, 24, requires_grad=True)
    y = hb.ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
    grad = torch.randn(24, 40)
    (ours,) = torch.autograd.grad(y, x, grad.t(), retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, grad.t().contiguous())
    assert torch.equal(ours, expected)


@pytest.mark.usefixtures("restore_level", "restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_and_threads_give_equal_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = (torch.randn(300, 701) * 10).to(dtype)
    x.view(-1)[: len(SPECIALS)] = SPECIALS.to(dtype)
    scale, zero_point = qparams(300, -128, 127)
    results = []
    for name in hb.available_capabilities():
        hb._extension.set_cpu_capability(name)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for axis in (0, None):
                args = (scale, zero_point) if axis == 0 else (scale[0], zero_point[0])
                results.append(
                    with_gradient(lambda v, a=axis, q=args: hb.ops.fake_quantize(v, *q, qmin=-128, qmax=127, axis=a), x)
                )
    for (y, grad), (first_y, first_grad) in zip(results[2:], results[:2] * len(results), strict=False):
        assert equal_bits(y.nan_to_num(123), first_y.nan_to_num(123))
        assert equal_bits(grad, first_grad)


def test_integer_dtypes_of_zero_point_and_scale_dtypes_are_accepted() -> None:
    x = torch.randn(9)
    expected = hb.ops.fake_quantize(x, torch.tensor(0.125), torch.tensor(3, dtype=torch.int32), qmin=0, qmax=7)
    for dtype in (torch.int64, torch.uint8, torch.int8):
        zero_point = torch.tensor([3], dtype=dtype)
        for scale in (torch.tensor([0.125]), torch.tensor(0.125, dtype=torch.bfloat16)):
            assert torch.equal(hb.ops.fake_quantize(x, scale, zero_point, qmin=0, qmax=7), expected)


def test_no_gradient_is_recorded_where_none_is_needed() -> None:
    x = torch.randn(5, requires_grad=True)
    with torch.no_grad():
        y = hb.ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
    assert not y.requires_grad


def test_gradient_flows_through_a_chain() -> None:
    x = torch.randn(64, requires_grad=True)
    y = hb.ops.fake_quantize(x * 2, torch.tensor(0.1), torch.tensor(0), qmin=-8, qmax=7)
    (y * 3).sum().backward()
    inside = (torch.round(x.detach() * 2 * (1 / torch.tensor(0.1))).clamp(-8, 7) * 0.1 - x.detach() * 2).abs() <= 0.0501
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, 6.0, 0.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_double_backward_raises(compiled: bool) -> None:
    def f(x: Tensor) -> Tensor:
        if compiled:  # the operator that compiled graphs call, with its own autograd formula
            return torch.ops.halfbyte.fake_quantize_train(x, torch.tensor(0.1), zero, -8, 7, None, None)[0]
        return hb.ops.fake_quantize(x, torch.tensor(0.1), zero, qmin=-8, qmax=7)

    zero = torch.tensor(0, dtype=torch.int32)
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad((f(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    scale, zero_point = qparams(6, -8, 7)

    def f(x: Tensor) -> Tensor:
        return hb.ops.fake_quantize(x * 2, scale, zero_point, qmin=-8, qmax=7, axis=0).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for columns in (20, 33):
        x = torch.randn(6, columns)
        ours, expected = with_gradient(compiled, x), with_gradient(f, x)
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), f(x))


def test_compiles_with_inductor() -> None:
    scale, zero_point = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)

    def f(x: Tensor) -> Tensor:  # nothing to generate code for beside the operator: compiling C++ takes a minute
        return hb.ops.fake_quantize(x, scale, zero_point, qmin=-8, qmax=7)

    x = torch.randn(6, 20)
    ours, expected = with_gradient(torch.compile(f, fullgraph=True), x), with_gradient(f, x)
    torch.testing.assert_close(ours, expected)


class PerToken(torch.nn.Module):
    """Fake-quantizes each row with a scale made from it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return hb.ops.fake_quantize(
            x, scale, torch.zeros_like(scale, dtype=torch.int32), qmin=-127, qmax=127, group_size=x.shape[-1]
        )


def test_exports_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(PerToken(), (torch.randn(4, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 32)
    assert torch.equal(program.module()(x), PerToken()(x))


def test_opcheck() -> None:
    scale, zero_point = qparams(5, -8, 7)
    x = torch.randn(5, 7)
    ops = torch.ops.halfbyte
    for args in (
        (x, scale, zero_point, -8, 7, 0, None),
        (x.t(), scale, zero_point, -8, 7, -1, None),
        (x, scale[0], zero_point[0], -8, 7, None, None),
        (x.bfloat16(), scale[:, None], zero_point[:, None], -8, 7, None, 7),
    ):
        torch.library.opcheck(ops.fake_quantize, args)
        torch.library.opcheck(ops.fake_quantize_train, args)
        torch.library.opcheck(ops.fake_quantize_train, (args[0].clone().requires_grad_(), *args[1:]))
    mask = ops.fake_quantize_train(x, scale, zero_point, -8, 7, 0, None)[1]
    torch.library.opcheck(ops.fake_quantize_backward, (x, mask))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "dtype torch.int64", {"x": torch.arange(24).reshape(4, 6)}),
        (TypeError, "dtype torch.float64", {"x": torch.zeros(4, 6, dtype=torch.float64)}),
        (TypeError, "pass a torch.Tensor", {"x": [1.0]}),
        (TypeError, r"torch.tensor\(value\)", {"scale": 0.1}),
        (TypeError, "zero_point has dtype torch.float32", {"zero_point": torch.zeros(4)}),
        (ValueError, "qmin=7, qmax=-8", {"qmin": 7, "qmax": -8}),
        (ValueError, "qmax=4194304", {"qmax": 1 << 22}),
        (ValueError, r"needs the shape \(4,\)", {"scale": torch.ones(6)}),
        (ValueError, r"zero_point has shape \(6,\)", {"zero_point": torch.zeros(6, dtype=torch.int32)}),
        (ValueError, "axis=2 is outside", {"axis": 2}),
        (ValueError, "exclude each other", {"group_size": 2}),
        (ValueError, "needs one element", {"axis": None}),
        (ValueError, "use 3 or 6", {"axis": None, "group_size": 4, "x": torch.randn(4, 6)}),
        (ValueError, "group_size=0 is not positive", {"axis": None, "group_size": 0}),
        (TypeError, "group_size=2.0 is not an integer", {"axis": None, "group_size": 2.0}),
        (ValueError, "needs at least one dimension", {"axis": None, "group_size": 1, "x": torch.tensor(1.0)}),
        (ValueError, r"scale.detach\(\)", {"scale": torch.ones(4, requires_grad=True)}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], match: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(4, 6),
        "scale": torch.ones(4),
        "zero_point": torch.zeros(4, dtype=torch.int32),
        "qmin": -8,
        "qmax": 7,
        "axis": 0,
    } | change
    with pytest.raises(error, match=match):
        hb.ops.fake_quantize(**arguments)  # type: ignore[arg-type]


def test_the_operator_itself_rejects_what_would_read_past_a_tensor() -> None:
    x, scale, zero_point = torch.randn(4, 6), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="4 are needed"):
        torch.ops.halfbyte.fake_quantize(x, scale, zero_point, -8, 7, 0, None)
    with pytest.raises(RuntimeError, match="zero_point lies outside"):
        torch.ops.halfbyte.fake_quantize(x, scale[0], zero_point[0] + (1 << 24), -8, 7, None, None)
    with pytest.raises(RuntimeError, match="mask has 2 bytes"):
        torch.ops.halfbyte.fake_quantize_backward(x, torch.zeros(2, dtype=torch.uint8))
