"""Histograms: against torch.histc, the definition at bin edges, and what growing the range keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import halfbyte as hb
from halfbyte._extension import available_capabilities, set_cpu_capability

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    return hb.ops.histogram_update_(torch.zeros(bins, dtype=torch.int64), x, low=low, high=high)


def defined_histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """The definition, in the float32 operations of the contract."""
    factor = torch.tensor(bins / (high - low), dtype=torch.float32)
    position = (x.float() - torch.tensor(low, dtype=torch.float32)) * factor
    return torch.bincount(position.floor().clamp(0, bins - 1).long().flatten(), minlength=bins)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (15,), (16,), (17,), (100, 100), (300, 1111)])
@pytest.mark.parametrize("bins", [1, 7, 2048, 5000])
def test_counts_equal_their_definition(shape: tuple[int, ...], bins: int, dtype: torch.dtype, level: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bins)).to(dtype)
    for low, high in ((-4.0, 4.0), (-1.0, 0.5), (0.25, 900.0)):
        assert torch.equal(histogram(x, bins, low, high), defined_histogram(x, bins, low, high))


def test_equals_histc_on_exact_bins() -> None:
    # Width 1/256: every edge and every quotient is exact, so both must find the same bin.
    x = torch.randn(100_000).clamp(-4, 4)
    assert torch.equal(histogram(x, 2048, -4, 4), torch.histc(x, 2048, -4, 4).long())


def test_values_outside_are_counted_in_the_end_bins() -> None:
    x = torch.tensor([-torch.inf, -1e30, -0.01, 0.0, 0.999, 1.0, 5.0, 3e38, torch.inf])
    assert histogram(x, 4, 0, 1).tolist() == [4, 0, 0, 5]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_counts_add_up_in_place(dtype: torch.dtype) -> None:
    counts = torch.zeros(64, dtype=dtype)
    batches = [torch.randn(1000) for _ in range(3)]
    for batch in batches:
        assert hb.ops.histogram_update_(counts, batch, low=-3, high=3) is counts
    assert torch.equal(counts, histogram(torch.cat(batches), 64, -3, 3).to(dtype))


@pytest.mark.parametrize("count", [1, 100, 300_000])
def test_nan_is_refused_and_nothing_counted(count: int, restore_threads: None) -> None:
    torch.set_num_threads(2)
    counts, x = torch.ones(64, dtype=torch.int64), torch.randn(count)
    x[-1] = torch.nan
    with pytest.raises(ValueError, match=rf"input of layer 'fc1' of shape \({count},\) holds 1 NaN"):
        hb.ops.histogram_update_(counts, x, low=-3, high=3, name="input of layer 'fc1'")
    assert torch.equal(counts, torch.ones(64, dtype=torch.int64))


def test_bits_do_not_depend_on_threads_or_level(restore_threads: None, restore_level: None) -> None:
    x = torch.randn(1_000_003)
    expected = defined_histogram(x, 2048, -5.0, 4.0)
    for level in available_capabilities():
        set_cpu_capability(level)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(histogram(x, 2048, -5.0, 4.0), expected)


def test_all_values_in_one_bin() -> None:
    assert histogram(torch.full((100_000,), 0.3), 2048, -1, 1).max() == 100_000


def test_non_contiguous_and_requires_grad() -> None:
    x = torch.randn(50, 60, requires_grad=True)
    assert torch.equal(histogram(x.t()[::2], 32, -2, 2), defined_histogram(x.detach().t()[::2], 32, -2, 2))


def test_opcheck() -> None:
    for dtype in (torch.int64, torch.float64):
        arguments = (torch.zeros(16, dtype=dtype), torch.randn(100), -2.0, 2.0)
        torch.library.opcheck(torch.ops.halfbyte.histogram_update_.default, arguments)


def test_arguments_are_checked() -> None:
    counts, x = torch.zeros(8, dtype=torch.int64), torch.randn(5)
    with pytest.raises(TypeError, match=r"counts has dtype torch\.float32"):
        hb.ops.histogram_update_(counts.float(), x, low=0, high=1)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        hb.ops.histogram_update_(counts, counts, low=0, high=1)
    with pytest.raises(ValueError, match=r"counts has shape \(2, 4\)"):
        hb.ops.histogram_update_(counts.view(2, 4), x, low=0, high=1)
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (-math.inf, 1.0)):
        with pytest.raises(ValueError, match="is not a range"):
            hb.ops.histogram_update_(counts, x, low=low, high=high)
    for low, high in ((0.0, 1e-40), (-3e38, 3e38)):
        with pytest.raises(ValueError, match="too fine or too wide"):
            hb.ops.histogram_update_(counts, x, low=low, high=high)


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-10_000, 10_000), min_size=1, max_size=50),
    later=st.lists(st.integers(-10_000, 10_000), min_size=1, max_size=50),
    bins=st.sampled_from([2, 6, 64]),
)
def test_growing_then_counting_equals_counting_on_the_final_range(
    values: list[int], later: list[int], bins: int
) -> None:
    # Multiples of 1/8 in a range of a power of two: every edge is exact, so equality is exact as well.
    first, second = torch.tensor(values) / 8, torch.tensor(later) / 8
    span = 2.0 ** math.ceil(math.log2(float(first.abs().max()) + 1))
    counts = histogram(first, bins, -span, span)
    grown, low, high = hb.ops.grow_histogram(
        counts, low=-span, high=span, to_low=float(second.min()), to_high=float(second.max())
    )
    assert grown.shape == counts.shape and grown.sum() == counts.sum()
    assert low <= float(second.min()) and float(second.max()) <= high
    assert math.log2((high - low) / (2 * span)).is_integer()
    if bins != 6:  # a sixth of a power of two is not exact
        assert torch.equal(grown, histogram(first, bins, low, high))


def test_growing_keeps_what_covers_the_range_already() -> None:
    counts = torch.arange(6)
    grown, low, high = hb.ops.grow_histogram(counts, low=-1, high=1, to_low=-0.5, to_high=1)
    assert grown is counts and (low, high) == (-1, 1)


def test_growing_on_both_sides() -> None:
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    grown, low, high = hb.ops.grow_histogram(counts, low=0, high=4, to_low=-1, to_high=9)
    assert (low, high) == (-4, 12)
    assert grown.tolist() == [0, 10, 0, 0]


def test_growing_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="3 bins, an odd number"):
        hb.ops.grow_histogram(torch.zeros(3, dtype=torch.int64), low=0, high=1, to_low=0, to_high=2)
    with pytest.raises(ValueError, match="to_high=inf is not finite"):
        hb.ops.grow_histogram(torch.zeros(4, dtype=torch.int64), low=0, high=1, to_low=0, to_high=math.inf)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_search_finds_a_range_no_worse_than_all_and_reports_its_error(dtype: torch.dtype) -> None:
    counts = histogram(torch.randn(10_000, generator=torch.Generator().manual_seed(0)), 2048, -5.0, 5.0).to(dtype)
    centers = (torch.arange(2048) + 0.5) * (10 / 2048) - 5

    def error(low: float, high: float) -> float:
        scale = torch.tensor((high - low) / 15)
        zero = torch.round(-low / scale).to(torch.int32)
        codes = hb.ops.fake_quantize(centers, scale, zero, qmin=0, qmax=15)
        return float(((codes - centers).square() * counts).sum() / counts.sum())

    low, high, found = hb.ops.search_histogram(counts, low=-5, high=5, qmin=0, qmax=15, symmetric=False)
    assert -5 <= low < 0 < high <= 5
    assert found == pytest.approx(error(low, high), rel=0.02)
    assert found < error(-5, 5)


def test_search_of_nothing_and_its_arguments() -> None:
    empty = torch.zeros(16, dtype=torch.int64)
    assert hb.ops.search_histogram(empty, low=0, high=1, qmin=0, qmax=255, symmetric=False) == (0, 0, 0)
    with pytest.raises(ValueError, match="qmax=0"):
        hb.ops.search_histogram(empty, low=0, high=1, qmin=-1, qmax=0, symmetric=True)
    with pytest.raises(TypeError, match="counts has dtype"):
        hb.ops.search_histogram(empty.float(), low=0, high=1, qmin=0, qmax=255, symmetric=False)


def test_opcheck_of_the_search() -> None:
    counts = histogram(torch.randn(100), 16, -2.0, 2.0)
    torch.library.opcheck(torch.ops.halfbyte.search_histogram.default, (counts, -2.0, 2.0, 0, 255, False))
