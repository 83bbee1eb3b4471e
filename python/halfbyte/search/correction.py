"""Correction rounds: neighbours of a solution are measured, and the best is kept.

The table adds up sensitivities that were measured one at a time. Where modules disturb each other the true optimum lies
near its solution; flips that the table thinks nearly free are tried on the model itself. Where many modules disturb each
other, as near the fewest bits, another estimate's solution may be nearer: the better of the two is where flips start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfbyte.search.bench import FLOAT, Choices

if TYPE_CHECKING:
    from halfbyte.search.session import Session
    from halfbyte.search.table import SensitivityTable

_TRIED = 12  # neighbours measured in a round


def correct(
    table: SensitivityTable,
    session: Session,
    allowed: Mapping[str, Sequence[str]],
    limits: Mapping[str, float],
    choices: Choices,
    measured: float,
    rounds: int,
) -> tuple[dict[str, str], float]:
    """The best configuration found within the limits, and its measured loss; never worse than a uniform one that fits.

    A limit on the loss is kept by measured losses: neighbours are then cheaper ones.
    """
    if "loss" in limits:
        return _cheaper(table, session, allowed, limits, choices, measured, rounds)
    best, best_loss = dict(choices), measured
    for key, loss in table.uniform_losses.items():
        uniform = {unit.name: key for unit in table.units if key in allowed[unit.name]}
        if len(uniform) == len(table.units) and _fits(table, uniform, limits) and loss < best_loss:
            best, best_loss = uniform, loss
    traces = session.traces()
    if traces is not None:
        other = table._solve(allowed, limits, "loss", traces)
        loss = session.measure(other).loss
        if loss < best_loss:
            best, best_loss = other, loss
    for _ in range(rounds):
        before = best_loss
        for neighbour in _neighbours(table, allowed, limits, best)[:_TRIED]:
            loss = session.measure(neighbour).loss
            if loss < best_loss:
                best, best_loss = neighbour, loss
                break  # its own neighbours are nearer now
        if best_loss >= before:
            break
    return best, best_loss


def _cheaper(
    table: SensitivityTable,
    session: Session,
    allowed: Mapping[str, Sequence[str]],
    limits: Mapping[str, float],
    choices: Choices,
    measured: float,
    rounds: int,
) -> tuple[dict[str, str], float]:
    """Tightens or loosens the table's limit on the loss until the measured loss keeps to the user's."""
    wanted = table._curve()(limits["loss"])
    best, best_loss = dict(choices), measured
    low, high = 0.0, limits["loss"]
    scale = limits["loss"]
    for _ in range(max(rounds, 1) * 3):
        if measured <= wanted:
            low = scale
            scale = scale * min(wanted / max(measured, 1e-30), 2.0) if high <= scale else (scale + high) / 2
        else:
            high = scale
            scale = (low + scale) / 2 if low else scale * wanted / measured
        tried = table._solve(allowed, {**limits, "loss": scale}, "bytes")
        loss = session.measure(tried).loss
        fits_now, fitted = loss <= wanted, best_loss <= wanted
        if (fits_now and not fitted) or (fits_now and table.bytes_of(tried) < table.bytes_of(best)):
            best, best_loss = tried, loss
        measured = loss
    return best, best_loss


def _fits(table: SensitivityTable, choices: Choices, limits: Mapping[str, float]) -> bool:
    costs = table.cost_of(choices)
    return all(costs[name] <= limit for name, limit in limits.items())


def _neighbours(
    table: SensitivityTable, allowed: Mapping[str, Sequence[str]], limits: Mapping[str, float], choices: Choices
) -> list[dict[str, str]]:
    """One unit changed, or two in opposite directions; those that the table thinks best first."""
    base = {unit.name: choices.get(unit.name, FLOAT) for unit in table.units}
    score = table.score(base)
    moves = []
    for name, keys in allowed.items():
        row = table.entries[name]
        for key in keys:
            if key != base[name]:
                moves.append((row[key].loss - row[base[name]].loss, row[key].bytes - row[base[name]].bytes, name, key))
    moves.sort()
    found: list[tuple[float, dict[str, str]]] = []
    for i, (gain, _, name, key) in enumerate(moves):
        single = {**base, name: key}
        if gain < 0 and _fits(table, single, limits):
            found.append((gain, single))
        if gain >= 0:
            break  # pairs need one that gains
        for cost, _, other, other_key in moves[i + 1 :]:
            if other == name or cost < 0 or gain + cost > 0.2 * score:
                continue
            pair = {**base, name: key, other: other_key}
            if _fits(table, pair, limits):
                found.append((gain + cost, pair))
                break  # the cheapest partner that makes room
    found.sort(key=lambda item: item[0])
    return [{n: k for n, k in each.items() if k != FLOAT} for _, each in found]
