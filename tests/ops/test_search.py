"""search_qparams against a plain-torch search over the same grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import halfbyte as hb

GRID, SHRINK = 24, 0.7


def code_range(bits: int, symmetric: bool, narrow: bool) -> tuple[int, int]:
    if not symmetric:
        return 0, (1 << bits) - 1
    qmax = (1 << (bits - 1)) - 1
    return -qmax if narrow else -qmax - 1, qmax


def loss_of(w: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`w` and `importance` are `[rows, groups, group_size]`; in float64."""
    scale, zero_point = scale.float()[..., None], zero_point.float()[..., None]
    codes = torch.clamp(torch.round(w * (1 / scale)) + zero_point, qmin, qmax) - zero_point
    return (importance * ((codes * scale).double() - w.double()) ** 2).sum(-1)


def search_in_torch(
    w: Tensor, importance: Tensor, bits: int, symmetric: bool, narrow: bool, scale_dtype: torch.dtype
) -> Tensor:
    """The smallest loss on the grid."""
    qmin, qmax = code_range(bits, symmetric, narrow)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    base = torch.maximum(high / qmax, low / qmin) if symmetric else (high - low) / qmax
    best = torch.full_like(base, math.inf, dtype=torch.float64)
    for j in range(GRID):
        shrink = torch.tensor(1 - j * SHRINK / GRID)
        scale = (base * shrink).to(scale_dtype).float()
        scale = torch.where(base == 0, 1.0, scale.clamp(min=torch.finfo(scale_dtype).tiny))
        zero_point = torch.zeros_like(scale) if symmetric else torch.round(-low * shrink / scale).clamp(0, qmax)
        best = torch.minimum(best, loss_of(w, importance, scale, zero_point, qmin, qmax))
    return best


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["symmetric", "narrow", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["none", "columns", "full"])
def test_loses_no_more_than_a_search_in_torch(bits: int, kind: str, scale_dtype: torch.dtype, weighting: str) -> None:
    torch.manual_seed(bits)
    w = torch.randn(5, 96) * torch.rand(5, 1) + 0.1
    w[1, :32] = 0
    w[2, 5] = 30
    importance = {"none": None, "columns": torch.rand(96), "full": torch.rand(5, 96)}[weighting]
    symmetric, narrow = kind != "asymmetric", kind == "narrow"
    scale, zero_point, loss = hb.ops.search_qparams(
        w,
        importance,
        bits=bits,
        symmetric=symmetric,
        narrow_range=narrow,
        group_size=32,
        grid=GRID,
        max_shrink=SHRINK,
        scale_dtype=scale_dtype,
    )
    assert scale.shape == zero_point.shape == loss.shape == (5, 3)
    assert (scale.dtype, zero_point.dtype, loss.dtype) == (scale_dtype, torch.int32, torch.float32)
    groups = w.reshape(5, 3, 32)
    weights = torch.ones(5, 96) if importance is None else importance.expand(5, 96)
    weights = weights.reshape(5, 3, 32).double()
    qmin, qmax = code_range(bits, symmetric, narrow)
    torch.testing.assert_close(
        loss.double(), loss_of(groups, weights, scale, zero_point, qmin, qmax), rtol=1e-4, atol=1e-12
    )
    expected = search_in_torch(groups, weights, bits, symmetric, narrow, scale_dtype)
    assert (loss <= expected * (1 + 1e-4) + 1e-12).all()
    assert loss.sum() >= expected.sum() * 0.5  # the refit is no miracle: the two searches agree on the size of the loss
    if symmetric:
        assert not zero_point.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_scale_is_the_weighted_mean_of_magnitudes(weighted: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 64)
    importance = torch.rand(64) if weighted else None
    scale, zero_point, loss = hb.ops.search_qparams(w, importance, bits=1, symmetric=True, group_size=32)
    weights = (torch.ones(64) if importance is None else importance).expand(3, 64).reshape(3, 2, 32)
    magnitude = w.abs().reshape(3, 2, 32)
    torch.testing.assert_close(scale, (weights * magnitude).sum(-1) / weights.sum(-1))
    torch.testing.assert_close(loss, (weights * (magnitude - scale[..., None]) ** 2).sum(-1))
    assert not zero_point.any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_of_one_gives_minmax(symmetric: bool) -> None:
    w = torch.randn(4, 60)
    scale, zero_point, _ = hb.ops.search_qparams(w, bits=4, symmetric=symmetric, grid=1, group_size=20)
    groups = w.reshape(4, 3, 20)
    if symmetric:
        expected = torch.maximum(groups.amax(-1) / 7, groups.amin(-1) / -8)
        assert not zero_point.any()
    else:
        expected = (groups.amax(-1) - groups.amin(-1)) / 15
        assert torch.equal(zero_point, torch.round(-groups.amin(-1) / expected).int())
    assert torch.equal(scale, expected)


def test_refit_lowers_the_loss_further() -> None:
    torch.manual_seed(1)
    w = torch.randn(64, 128)
    groups, ones = w.reshape(64, 4, 32), torch.ones(64, 4, 32, dtype=torch.float64)
    _, _, loss = hb.ops.search_qparams(w, bits=3, symmetric=True, group_size=32, grid=GRID, max_shrink=SHRINK)
    assert loss.sum() < 0.999 * search_in_torch(groups, ones, 3, True, False, torch.float32).sum()


def test_awkward_groups() -> None:
    tiny, huge = 1e-40, 3e38
    w = torch.tensor(
        [[0.0] * 4, [tiny] * 4, [huge, -huge, 0, 0], [math.nan, 1, 1, 1], [math.inf, 1, 1, 1], [-1.0, -1, -1, -1]]
    )
    for scale_dtype in (torch.float32, torch.float16, torch.bfloat16):
        for symmetric in (False, True):
            scale, zero_point, loss = hb.ops.search_qparams(w, bits=4, symmetric=symmetric, scale_dtype=scale_dtype)
            assert scale[0] == 1 and loss[0] == 0
            assert scale[1] == torch.finfo(scale_dtype).tiny
            assert scale[3].isnan() and loss[3].isnan() and scale[4].isnan() and loss[4].isnan()
            assert scale[5] > 0 and scale[5].isfinite()
            assert (zero_point >= 0).all() and (zero_point <= 15).all()


def test_zero_importance_keeps_minmax() -> None:
    w = torch.randn(2, 32)
    plain = hb.ops.search_qparams(w, bits=4, symmetric=True, grid=1)[0]
    scale, _, loss = hb.ops.search_qparams(w, torch.zeros(32), bits=4, symmetric=True)
    assert torch.equal(scale, plain) and not loss.any()
    assert hb.ops.search_qparams(w, torch.zeros(32), bits=1, symmetric=True)[0].isfinite().all()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
@pytest.mark.usefixtures("restore_level", "restore_threads")
def test_levels_and_threads_give_equal_bits(columns: int) -> None:
    torch.manual_seed(2)
    w, importance = torch.randn(37, columns), torch.rand(37, columns)
    results = []
    for name in hb.available_capabilities():
        hb._extension.set_cpu_capability(name)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for symmetric in (False, True):
                results.append((symmetric, hb.ops.search_qparams(w, importance, bits=4, symmetric=symmetric)))
    for symmetric, found in results:
        for ours, first in zip(found, results[symmetric][1], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_searched_as_their_float32_values(dtype: torch.dtype) -> None:
    w = torch.randn(3, 50).to(dtype)
    for ours, expected in zip(
        hb.ops.search_qparams(w, bits=4, symmetric=False),
        hb.ops.search_qparams(w.float(), bits=4, symmetric=False),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_empty_weights() -> None:
    for shape in ((0, 8), (3, 0)):
        scale, _, _ = hb.ops.search_qparams(torch.zeros(shape), bits=4, symmetric=True)
        assert scale.numel() == 0


def test_compile_and_opcheck() -> None:
    w = torch.randn(4, 64)

    def f(w: Tensor) -> Tensor:
        scale, _, loss = hb.ops.search_qparams(w, bits=4, symmetric=True, group_size=16)
        return scale + loss

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(w), f(w))
    for importance in (None, torch.rand(64)):
        for dtype in (torch.float32, torch.float16):
            args = (w, importance, 4, False, False, 16, 10, 0.8, dtype)
            torch.library.opcheck(torch.ops.halfbyte.search_qparams, args)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "bits=0 is outside", {"bits": 0}),
        (ValueError, "grid=0 is not positive", {"grid": 0}),
        (ValueError, "max_shrink=1.0 is outside", {"max_shrink": 1.0}),
        (ValueError, "use 2 or 4", {"group_size": 3}),
        (ValueError, "narrow_range=True needs", {"narrow_range": True, "symmetric": False}),
        (TypeError, "scale_dtype=torch.float64", {"scale_dtype": torch.float64}),
        (ValueError, r"importance has shape \(3,\)", {"importance": torch.ones(3)}),
        (TypeError, "w has dtype torch.int64", {"w": torch.zeros(2, 8, dtype=torch.int64)}),
        (ValueError, "takes a matrix", {"w": torch.zeros(8)}),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], match: str, change: dict[str, object]) -> None:
    arguments: dict[str, object] = {"w": torch.randn(2, 8), "bits": 4, "symmetric": True} | change
    with pytest.raises(error, match=match):
        hb.ops.search_qparams(**arguments)  # type: ignore[arg-type]
