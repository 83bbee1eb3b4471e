"""observe_minmax against torch.amin and torch.amax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import halfbyte as hb

SHAPES = [(1,), (17,), (1000,), (3, 3), (64, 3, 3, 3), (5, 65), (7, 3, 50), (1000, 2), (2, 200000), (300000,)]


def expected_minmax(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    x = x.float()
    if group_size is not None:
        x = x.reshape(*x.shape[:-1], -1, group_size)
        return x.amin(-1), x.amax(-1)
    if axis is None:
        return x.min(), x.max()
    x = x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x[:, None]
    return x.amin(1), x.amax(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_granularity_equals_torch(level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    for axis in (None, *range(x.dim())):
        for ours, theirs in zip(hb.ops.observe_minmax(x, axis=axis), expected_minmax(x, axis, None), strict=True):
            assert torch.equal(ours, theirs)
    for group_size in {1, shape[-1]}:
        lo, hi = hb.ops.observe_minmax(x, group_size=group_size)
        expected = expected_minmax(x, None, group_size)
        assert torch.equal(lo, expected[0]) and torch.equal(hi, expected[1])


@pytest.mark.parametrize("group_size", [2, 8, 15, 16, 32, 120])
def test_groups_equal_torch(level: str, group_size: int) -> None:
    x = torch.randn(3, 5, group_size * 4)
    lo, hi = hb.ops.observe_minmax(x, group_size=group_size)
    expected = expected_minmax(x, None, group_size)
    assert torch.equal(lo, expected[0]) and torch.equal(hi, expected[1])


@pytest.mark.parametrize("place", [0, 31, 200, 999])
def test_nan_marks_the_channels_that_hold_it(level: str, place: int) -> None:
    x = torch.randn(20, 50)
    x.view(-1)[place] = math.nan
    for axis in (0, 1):
        for extreme in hb.ops.observe_minmax(x, axis=axis):
            assert torch.equal(extreme.isnan(), x.isnan().any(1 - axis))
    assert all(extreme.isnan() for extreme in hb.ops.observe_minmax(x))


def test_infinities_are_extremes_and_zeros_positive(level: str) -> None:
    lo, hi = hb.ops.observe_minmax(torch.tensor([[math.inf, -math.inf, 1.0], [-0.0, -0.0, -0.0]]), axis=0)
    assert lo.tolist() == [-math.inf, 0.0] and hi.tolist() == [math.inf, 0.0]
    assert not torch.signbit(lo[1]) and not torch.signbit(hi[1])


def test_non_contiguous_input_equals_its_copy() -> None:
    x = torch.randn(40, 30)[::2].t()
    assert torch.equal(hb.ops.observe_minmax(x, axis=1)[0], x.amin(0))


@pytest.mark.usefixtures("restore_level")
def test_levels_and_threads_give_equal_bits(threads: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(900, 333)
    x[1, 2] = math.nan
    x[5] = -0.0
    for name in hb.available_capabilities():
        hb._extension.set_cpu_capability(name)
        for axis in (None, 0, 1):
            for ours, theirs in zip(hb.ops.observe_minmax(x, axis=axis), expected_minmax(x, axis, None), strict=True):
                assert torch.equal(ours.nan_to_num(77), theirs.nan_to_num(77))


def test_compile_export_and_opcheck() -> None:
    x = torch.randn(6, 32)

    class Observe(torch.nn.Module):
        """Sum of the group ranges."""

        def forward(self, x: Tensor) -> Tensor:
            lo, hi = hb.ops.observe_minmax(x, group_size=16)
            return (hi - lo).sum(-1)

    expected = Observe()(x)
    assert torch.equal(torch.compile(Observe(), fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(Observe(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x[:3]), expected[:3])
    for axis, group_size in ((None, None), (0, None), (-1, None), (None, 8)):
        torch.library.opcheck(torch.ops.halfbyte.observe_minmax, (x, axis, group_size))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="is empty"):
        hb.ops.observe_minmax(torch.zeros(0))
    with pytest.raises(ValueError, match="is empty"):
        hb.ops.observe_minmax(torch.zeros(3, 0), axis=0)
    assert hb.ops.observe_minmax(torch.zeros(3, 0), axis=1)[0].shape == (0,)
    with pytest.raises(TypeError, match=r"dtype torch.int64"):
        hb.ops.observe_minmax(torch.arange(3))
