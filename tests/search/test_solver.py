"""The integer programme against brute force, and the curve from scores to losses."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.search.prediction import LossCurve
from halfbyte.search.solver import Problem, solve, total


def problem(seed: int, units: int, schemes: int) -> Problem:
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(units), schemes)
    costs = {name: rng.lognormal(0, 2, units * schemes) for name in ("loss", "latency")}
    return Problem(unit, {**costs, "bytes": rng.integers(1, 1000, units * schemes).astype(float)})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.floats(0.0, 1.0), second=st.floats(0.3, 1.0))
def test_is_as_good_as_brute_force(seed: int, part: float, second: float) -> None:
    p = problem(seed, units=4, schemes=3)
    every = list(itertools.product(*([range(3)] * 4)))
    choices = [[3 * u + s for u, s in enumerate(row)] for row in every]
    sizes, times = ([total(p, c, name) for c in choices] for name in ("bytes", "latency"))
    limits = {
        "bytes": min(sizes) + part * (max(sizes) - min(sizes)),
        "latency": min(times) + second * (max(times) - min(times)),
    }
    fitting = [
        c for c, b, t in zip(choices, sizes, times, strict=True) if b <= limits["bytes"] and t <= limits["latency"]
    ]
    found = solve(p, "loss", limits)
    if not fitting:
        assert found is None
        return
    assert found is not None
    for name, limit in limits.items():
        assert total(p, found, name) <= limit * (1 + 1e-6)
    best = min(total(p, c, "loss") for c in fitting)
    spread = np.ptp(p.costs["loss"])
    assert total(p, found, "loss") <= best + 2e-4 * spread


def test_equal_losses_take_fewer_bytes() -> None:
    p = Problem(np.array([0, 0]), {"loss": np.array([1.0, 1.0]), "bytes": np.array([9.0, 4.0])})
    assert solve(p, "loss", {"bytes": 10.0}) == [1]


def test_is_deterministic_and_quick() -> None:
    p = problem(1, units=500, schemes=8)
    floor = np.minimum.reduceat(p.costs["bytes"], np.arange(0, 4000, 8)).sum()
    start = time.perf_counter()
    first = solve(p, "loss", {"bytes": 2 * floor})
    assert time.perf_counter() - start < 10.0  # under a second on a quiet machine
    assert first == solve(p, "loss", {"bytes": 2 * floor})


def test_curve_rises_and_inverts() -> None:
    curve = LossCurve.through([(1.0, 2.0), (2.0, 1.5), (10.0, 50.0), (0.0, 0.0)])
    assert curve(1.0) == 2.0
    assert curve(10.0) == pytest.approx(50.0)
    assert curve(0.5) == pytest.approx(1.0)  # proportional below the first point
    scores = np.geomspace(1e-3, 1e3, 50)
    losses = [curve(float(s)) for s in scores]
    assert losses == sorted(losses)
    for s in scores:
        assert curve.inverse(curve(float(s))) == pytest.approx(float(s))


def test_curve_without_points_is_the_identity() -> None:
    assert LossCurve.through([])(0.25) == 0.25
    assert math.isclose(LossCurve.through([(0.0, 0.0)]).inverse(3.0), 3.0)
