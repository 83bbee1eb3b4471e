"""quantize and dequantize against PyTorch's own operators and the plain-torch reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import halfbyte as hb

RANGES = [
    (-128, 127, torch.int8),
    (0, 255, torch.uint8),
    (-8, 7, torch.int8),
    (0, 1, torch.uint8),
    (-300, 300, torch.int32),
]


def qparams(shape: tuple[int, ...], qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    return torch.rand(shape) * 0.2 + 0.01, torch.randint(qmin, qmax + 1, shape, dtype=torch.int32)


@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (3, 65), (2, 3, 40)], ids=str)
@pytest.mark.parametrize(("qmin", "qmax", "torch_dtype"), [(-128, 127, torch.qint8), (0, 255, torch.quint8)])
def test_per_tensor_equals_torch(
    level: str, shape: tuple[int, ...], qmin: int, qmax: int, torch_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 10
    zero = 5 if qmin else 120
    theirs = torch.quantize_per_tensor(x, 0.07, zero, torch_dtype)
    scale, zero_point = torch.tensor(0.07), torch.tensor(zero)
    ours = hb.ops.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax)
    assert torch.equal(ours, theirs.int_repr())
    assert torch.equal(hb.ops.dequantize(ours, scale, zero_point), theirs.dequantize())


@pytest.mark.parametrize(("qmin", "qmax", "dtype"), RANGES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_granularity_equals_the_reference(
    level: str, qmin: int, qmax: int, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = (torch.randn(5, 6, 48) * (qmax - qmin) * 0.05).to(x_dtype)
    for axis, group_size, shape in (
        (None, None, ()),
        (0, None, (5,)),
        (1, None, (6,)),
        (2, None, (48,)),
        (None, 16, (5, 6, 3)),
        (None, 3, (5, 6, 16)),
        (None, 48, (5, 6, 1)),
    ):
        scale, zero_point = qparams(shape, qmin, qmax)
        q = hb.ops.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis, group_size=group_size)
        expected = hb.functional.quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis, group_size=group_size)
        assert q.dtype == dtype
        assert torch.equal(q.int(), expected)
        for y_dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = hb.ops.dequantize(q, scale, zero_point, axis=axis, group_size=group_size, dtype=y_dtype)
            reference = hb.functional.dequantize(q, scale, zero_point, axis=axis, group_size=group_size)
            assert torch.equal(y, reference.to(y_dtype))


def test_fake_quantize_is_quantize_then_dequantize(level: str) -> None:
    x = torch.randn(7, 64) * 3
    scale, zero_point = qparams((7, 2), 0, 15)
    q = hb.ops.quantize(x, scale, zero_point, qmin=0, qmax=15, group_size=32)
    y = hb.ops.fake_quantize(x, scale, zero_point, qmin=0, qmax=15, group_size=32)
    assert torch.equal(hb.ops.dequantize(q, scale, zero_point, group_size=32), y)


def test_nan_becomes_the_zero_point_and_infinities_the_ends(level: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30] * 5)
    q = hb.ops.quantize(x, torch.tensor(0.1), torch.tensor(3), qmin=-8, qmax=7)
    assert q.tolist() == [3, 7, -8, 7, -8] * 5


def test_non_contiguous_input_equals_its_copy() -> None:
    x = torch.randn(40, 30).t()
    scale, zero_point = qparams((30,), -8, 7)
    q = hb.ops.quantize(x, scale, zero_point, qmin=-8, qmax=7, axis=0)
    assert torch.equal(q, hb.ops.quantize(x.contiguous(), scale, zero_point, qmin=-8, qmax=7, axis=0))
    y = hb.ops.dequantize(q.t(), scale, zero_point, axis=1)
    assert y.is_contiguous()
    assert torch.equal(y, hb.ops.dequantize(q, scale, zero_point, axis=0).t())


@pytest.mark.usefixtures("restore_level")
def test_levels_and_threads_give_equal_bits(threads: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(200, 512) * 3
    scale, zero_point = qparams((200, 4), -8, 7)
    results = []
    for name in hb.available_capabilities():
        hb._extension.set_cpu_capability(name)
        q = hb.ops.quantize(x, scale, zero_point, qmin=-8, qmax=7, group_size=128)
        results.append((q, hb.ops.dequantize(q, scale, zero_point, group_size=128, dtype=torch.bfloat16)))
    expected = hb.functional.quantize(x, scale, zero_point, qmin=-8, qmax=7, group_size=128)
    for q, y in results:
        assert torch.equal(q.int(), expected)
        assert torch.equal(y, results[0][1])


def test_compile_and_export() -> None:
    scale, zero_point = qparams((8,), -8, 7)

    class RoundTrip(torch.nn.Module):
        """Quantizes and dequantizes."""

        def forward(self, x: Tensor) -> Tensor:
            q = hb.ops.quantize(x, scale, zero_point, qmin=-8, qmax=7, axis=1)
            return hb.ops.dequantize(q, scale, zero_point, axis=1)

    x = torch.randn(5, 8)
    expected = RoundTrip()(x)
    assert torch.equal(torch.compile(RoundTrip(), fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(RoundTrip(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x[:3]), expected[:3])


def test_opcheck() -> None:
    scale, zero_point = qparams((5,), -8, 7)
    for qmin, qmax, _ in RANGES:
        args = (torch.randn(5, 7), scale, zero_point, qmin, qmax, 0, None)
        torch.library.opcheck(torch.ops.halfbyte.quantize, args)
    q = torch.randint(-8, 8, (5, 7), dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.halfbyte.dequantize, (q, scale, zero_point, 0, None, dtype))


def test_bad_arguments_are_named() -> None:
    scale, zero_point, q = torch.tensor(0.1), torch.tensor(0), torch.zeros(4, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"q has dtype torch.float32"):
        hb.ops.dequantize(q.float(), scale, zero_point)
    with pytest.raises(TypeError, match=r"dtype=torch.float64 is not supported"):
        hb.ops.dequantize(q, scale, zero_point, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x has dtype torch.int8"):
        hb.ops.quantize(q, scale, zero_point, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="use 2 or 4"):
        hb.ops.quantize(q.float(), scale, zero_point, qmin=-8, qmax=7, group_size=3)
