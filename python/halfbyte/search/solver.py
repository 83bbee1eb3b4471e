"""Which candidate for which unit: an integer programme, solved to optimality by HiGHS through scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Relative gaps to the optimum; what is measured is known far less well, and HiGHS needs ten times as long for the last digits.
_GAP, _GAP_OF_MANY, _MANY = 1e-4, 1e-3, 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One row a candidate; each belongs to a unit, and every unit takes exactly one.

    Attributes:
        unit: `[n]` index of the unit of each candidate, in ascending order.
        costs: Name to `[n]`: what each candidate adds to the loss, the bytes, the latency.
    """

    unit: NDArray[np.int64]
    costs: dict[str, NDArray[np.float64]]


def solve(problem: Problem, minimize: str, limits: dict[str, float]) -> list[int] | None:
    """The choice with the smallest sum of one cost whose other sums keep to their limits.

    Among choices that are equal in it, the one with fewer bytes is taken: bytes count a millionth of their spread.

    Args:
        problem: The candidates.
        minimize: Name of the cost to minimise.
        limits: Name of a cost to the largest sum allowed.

    Returns:
        Index of the chosen candidate of each unit, or None if no choice keeps to the limits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n, units = len(problem.unit), int(problem.unit[-1]) + 1
    objective = _scaled(problem, minimize)
    if minimize != "bytes":
        objective = objective + 1e-6 * _scaled(problem, "bytes")
    one_each = csr_array((np.ones(n), (problem.unit, np.arange(n))), shape=(units, n))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        cost = problem.costs[name]
        # Every unit pays its cheapest candidate; what is above that is divided by the room there is.
        floor = np.minimum.reduceat(cost, _starts(problem))
        room = limit - floor.sum()
        if room < -1e-9 * max(abs(limit), 1e-30):
            return None
        above = cost - floor[problem.unit]
        scale = max(room, 1e-12 * max(abs(limit), 1e-30))
        constraints.append(LinearConstraint(csr_array(above[None] / scale), -np.inf, max(room, 0.0) / scale))
    result = milp(
        objective,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": _GAP if n <= _MANY else _GAP_OF_MANY, "time_limit": 20.0},
    )
    if result.x is None:
        return None
    chosen = [-1] * units
    for index in np.flatnonzero(result.x > 0.5):
        chosen[int(problem.unit[index])] = int(index)
    return chosen


def total(problem: Problem, chosen: Sequence[int], cost: str) -> float:
    """Sum of one cost over a choice."""
    return float(problem.costs[cost][np.asarray(chosen)].sum())


def _starts(problem: Problem) -> NDArray[np.int64]:
    return np.searchsorted(problem.unit, np.arange(int(problem.unit[-1]) + 1))


def _scaled(problem: Problem, name: str) -> NDArray[np.float64]:
    """A cost less its unit's smallest, divided by the largest: of the size that HiGHS's tolerances are made for."""
    cost = problem.costs[name]
    above = cost - np.minimum.reduceat(cost, _starts(problem))[problem.unit]
    largest = above.max()
    return above / largest if largest > 0 else above
