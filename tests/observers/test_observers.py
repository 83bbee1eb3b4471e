"""Observers: equality with PyTorch's on the same data, what merging keeps, and what they say of themselves."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.ao import quantization as ao

import halfbyte as hb
from halfbyte.observers import MSE, Entropy, Histogram, MinMax, MovingAverageMinMax, Observer, Percentile

warnings.filterwarnings("ignore", category=DeprecationWarning)
OBSERVERS = (MinMax, MovingAverageMinMax, Histogram, Percentile, MSE, Entropy)


def batches(count: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(50, 41, generator=generator) * (1 + i / 4) + 0.3 for i in range(count)]


def seen(observer: Observer, data: list[Tensor]) -> Observer:
    for batch in data:
        observer.update(batch)
    return observer


def fake_quantize_error(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> float:
    y = torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero_point.int().reshape(()), qmin, qmax)
    return float((y - x).double().square().mean())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (MinMax(), ao.MinMaxObserver()),
        (MovingAverageMinMax(momentum=0.1), ao.MovingAverageMinMaxObserver(averaging_constant=0.1)),
    ],
    ids=["minmax", "moving average"],
)
def test_asymmetric_qparams_equal_torch_bit_for_bit(ours: Observer, theirs: ao.ObserverBase) -> None:
    for batch in batches():
        ours.update(batch)
        theirs(batch)
    scale, zero_point = ours.qparams()
    their_scale, their_zero_point = theirs.calculate_qparams()
    assert torch.equal(scale.reshape(1), their_scale)
    assert torch.equal(zero_point.reshape(1).long(), their_zero_point.long())


@pytest.mark.parametrize("axis", [0, 1])
def test_ranges_per_axis_equal_torch(axis: int) -> None:
    ours, theirs = MinMax(axis=axis), ao.PerChannelMinMaxObserver(ch_axis=axis)
    for batch in batches():
        ours.update(batch)
        theirs(batch)
    assert torch.equal(ours.range().low, theirs.min_val)
    assert torch.equal(ours.qparams()[0], theirs.calculate_qparams()[0])


def test_symmetric_scale_is_of_127_codes_where_torch_has_127_and_a_half() -> None:
    ours = seen(MinMax(symmetric=True), batches())
    theirs = ao.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    for batch in batches():
        theirs(batch)
    torch.testing.assert_close(ours.qparams()[0] * 127, theirs.calculate_qparams()[0].reshape(()) * 127.5)
    assert int(ours.qparams()[1]) == 0


DISTRIBUTIONS = {
    "normal": lambda g: torch.randn(200_000, generator=g),
    "relu": lambda g: torch.randn(200_000, generator=g).relu(),
    "uniform": lambda g: torch.rand(200_000, generator=g) * 3 - 1,
    "heavy tails": lambda g: torch.randn(200_000, generator=g) * torch.randn(200_000, generator=g).exp(),
    "one outlier": lambda g: torch.cat([torch.randn(200_000, generator=g), torch.tensor([60.0])]),
    "shifted": lambda g: torch.randn(200_000, generator=g) * 0.2 + 3,
    "two humps": lambda g: torch.cat([torch.randn(100_000, generator=g) - 4, torch.randn(100_000, generator=g) + 9]),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_search_loses_no_more_than_torch_and_minmax(name: str, symmetric: bool) -> None:
    x = DISTRIBUTIONS[name](torch.Generator().manual_seed(1))
    ours = seen(MSE(symmetric=symmetric, samples_per_batch=None), [x])
    kind = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric} if symmetric else {}
    theirs = ao.HistogramObserver(**kind)
    theirs(x)
    codes = (-128, 127) if symmetric else (0, 255)
    error = fake_quantize_error(x, *ours.qparams(), *codes)
    assert error <= fake_quantize_error(x, *theirs.calculate_qparams(), *codes) * 1.001
    assert error <= fake_quantize_error(x, *seen(MinMax(symmetric=symmetric), [x]).qparams(), *codes) * 1.001


@pytest.mark.parametrize("bits", [2, 4])
def test_mse_search_is_near_the_best_of_a_dense_grid(bits: int) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(2)) + 0.5
    ours = seen(MSE(bits=bits, samples_per_batch=None), [x])
    qmax = 2**bits - 1
    best = math.inf
    for low in torch.linspace(0.05, 1, 40) * x.min():
        for high in torch.linspace(0.05, 1, 40) * x.max():
            scale = (high - low) / qmax
            best = min(best, fake_quantize_error(x, scale, torch.round(-low / scale), 0, qmax))
    assert fake_quantize_error(x, *ours.qparams(), 0, qmax) <= best * 1.02


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 100])
def test_percentile_equals_the_quantiles_within_a_bin(percentile: float) -> None:
    data = batches()
    observer = seen(Percentile(percentile), data)
    x = torch.cat(data).flatten().double()
    found = observer.range()
    for end, q in ((found.low, 1 - percentile / 100), (found.high, percentile / 100)):
        assert float(end) == pytest.approx(float(torch.quantile(x, q)), abs=2 * observer.width)


def test_entropy_cuts_off_rare_outliers_and_keeps_a_full_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator)
    x[:3] = 40.0
    assert float(seen(Entropy(), [x]).range().high) < 12
    uniform = torch.rand(100_000, generator=generator)
    assert float(seen(Entropy(), [uniform]).range().high) > 0.95


def test_histogram_conserves_mass_while_its_range_grows() -> None:
    observer = Histogram(samples_per_batch=None)
    for exponent in (-20, 3, -3, 10, 25, 0):
        observer.update(torch.randn(100) * 2.0**exponent)
    assert int(observer.counts.sum()) == 600
    assert len(observer.counts) <= 4096
    for extreme in (torch.zeros(7), torch.full((5,), 1e30), torch.full((5,), -1e-30)):
        observer.update(extreme)
    assert int(observer.counts.sum()) == 617


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(-5000, 5000), min_size=1, max_size=20), min_size=2, max_size=5),
    st.integers(-12, 12),
    st.randoms(use_true_random=False),
)
def test_order_and_grouping_of_batches_do_not_matter(values: list[list[int]], exponent: int, random) -> None:
    # Small integers times a power of two: every edge is exact.
    data = [torch.tensor(batch, dtype=torch.float32) * 2.0**exponent for batch in values]
    in_order = seen(Histogram(), data)
    shuffled = list(data)
    random.shuffle(shuffled)
    merged = Histogram()
    for batch in shuffled:
        merged.merge(seen(Histogram(), [batch]))
    assert torch.equal(in_order.counts, merged.counts)
    assert (in_order.low, in_order.high) == (merged.low, merged.high)
    assert merged.samples == in_order.samples
    assert torch.equal(in_order.range().low, merged.range().low)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_merge_is_like_seeing_all(kind: type[Observer]) -> None:
    data = batches(8)
    whole, parts = seen(kind(), data), [seen(kind(), data[:3]), seen(kind(), data[3:])]
    parts[0].merge(parts[1])
    assert (parts[0].samples, parts[0].batches) == (whole.samples, whole.batches)
    span = float(whole.range().high - whole.range().low)
    tolerance = 0.15 * span if kind is MovingAverageMinMax else 1e-6
    assert float(parts[0].range().high) == pytest.approx(float(whole.range().high), abs=tolerance)


def test_merge_refuses_other_options() -> None:
    with pytest.raises(ValueError, match="give both the same options"):
        MinMax().merge(MinMax(symmetric=True))
    with pytest.raises(ValueError, match="cannot be merged"):
        MSE().merge(Histogram())


@pytest.mark.parametrize("kind", OBSERVERS)
def test_memory_does_not_grow_with_batches(kind: type[Observer]) -> None:
    observer = seen(kind(), batches(2))
    few = len(pickle.dumps(observer))
    for seed in range(30):
        seen(observer, batches(2, seed))
    assert len(pickle.dumps(observer)) < few + 40_000


def test_convergence_is_reached_on_stationary_data_and_not_on_a_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    steady, drifting = MSE(), MSE()
    for i in range(32):
        x = torch.randn(5000, generator=generator)
        steady.update(x)
        drifting.update(x * (1 + i))
        assert i >= 7 or not steady.range().converged
    assert steady.range().converged
    assert not drifting.range().converged
    assert float(drifting.range().high_band) > 0.05 * float(drifting.range().high)
    assert (steady.range().batches, steady.range().samples) == (32, 160_000)


def test_band_covers_what_more_data_changes() -> None:
    inside = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        observer = Percentile(99)
        for _ in range(16):
            observer.update(torch.randn(500, generator=generator))
        found = observer.range()
        inside += abs(float(found.high) - 2.3263) <= 2 * float(found.high_band)
    assert inside >= 16


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_and_nothing_is_added(kind: type[Observer], bad: float) -> None:
    observer = seen(kind(name="input of fc1"), batches(2))
    before = copy.deepcopy(observer)
    with pytest.raises(hb.QuantizationError, match=r"input of fc1: (NaN|inf)"):
        observer.update(torch.tensor([1.0, bad]))
    assert observer.samples == before.samples
    assert torch.equal(observer.range().low, before.range().low)
    assert torch.equal(observer.range().high, before.range().high)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        observer.update(torch.arange(3))


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.5, 1e-30, 1e30])
def test_constants_are_represented_exactly(kind: type[Observer], constant: float) -> None:
    observer = seen(kind(), [torch.empty(0), torch.full((4, 4), constant)])
    scale, zero_point = observer.qparams()
    y = hb.ops.fake_quantize(torch.tensor([constant, 0.0]), scale, zero_point, qmin=0, qmax=255)
    torch.testing.assert_close(y, torch.tensor([constant, 0.0]), rtol=1e-6, atol=0)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(hb.QuantizationError, match="no data was seen"):
        seen(MSE(), [torch.empty(0, 3)]).qparams()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Percentile(40), "percentile=40"),
        (lambda: MinMax(bits=9), "bits=9"),
        (lambda: MSE(axis=0), "axis=None"),
        (lambda: MinMax(tolerance=0), "tolerance=0"),
        (lambda: MovingAverageMinMax(momentum=2), "momentum=2"),
        (lambda: Histogram(samples_per_batch=0), "samples_per_batch=0"),
    ],
)
def test_options_are_checked(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
