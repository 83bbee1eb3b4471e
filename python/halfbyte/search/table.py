"""What was measured, and what follows from it: allocations under budgets, and the Pareto front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from halfbyte.calibration import Data, check_data
from halfbyte.errors import QuantizationError
from halfbyte.recipe import Pattern
from halfbyte.schemes import Scheme
from halfbyte.search.allocation import Allocation
from halfbyte.search.bench import FLOAT, Choices, short_labels
from halfbyte.search.constraints import allowed_candidates
from halfbyte.search.correction import correct
from halfbyte.search.front import Front
from halfbyte.search.latency import Latency, measure_latency
from halfbyte.search.losses import summarize
from halfbyte.search.prediction import LossCurve
from halfbyte.search.proxies import Scores
from halfbyte.search.quantities import parse_quantity
from halfbyte.search.session import Session
from halfbyte.search.solver import Problem, solve, total
from halfbyte.search.table_file import from_fields, read_json, to_fields
from halfbyte.search.units import Entry, Unit
from halfbyte.table import Table

Seconds = float | str


@dataclass(slots=True, kw_only=True, repr=False)
class SensitivityTable:
    """Loss, bytes and, once timed, latency of every module in every scheme. Prints as a table, shows as one in a notebook.

    Attributes:
        units: What is decided about: modules, or groups that share a weight or were tied.
        schemes: Key (the scheme in words) to scheme.
        entries: Unit name to key, "float" included, to what it costs.
        rest_bytes: Bytes of everything else.
        uniform_losses: Key to the measured loss with that scheme everywhere.
        loss_name: What the losses are.
        method: How they were found.
        latency: Seconds of every candidate, once `measure_latency` ran.
        warnings: What makes the figures doubtful.
    """

    units: tuple[Unit, ...]
    schemes: dict[str, Scheme]
    entries: dict[str, dict[str, Entry]]
    rest_bytes: int
    uniform_losses: dict[str, float]
    loss_name: str
    method: str
    latency: Latency | None = None
    warnings: list[str] = field(default_factory=list)
    session: Session | None = field(default=None, repr=False, compare=False)

    def allocate(
        self,
        *,
        max_bytes: int | str | None = None,
        max_latency: Seconds | None = None,
        max_loss: float | None = None,
        pins: Mapping[Pattern, Scheme | None] | None = None,
        min_bits: int | None = None,
        ends: Scheme | None = None,
        corrections: int = 2,
        holdout: Data | None = None,
    ) -> Allocation:
        """The best scheme for every module under one or two budgets: a recipe.

        With `max_bytes` or `max_latency`, the smallest loss; with `max_loss`, the fewest bytes, `max_latency` kept too if
        given. Solved exactly on the table's figures; then, if the model is at hand, neighbours of the solution are measured
        and the best kept.

        Args:
            max_bytes: Bytes of the whole model as saved, or text such as "20MB".
            max_latency: Seconds of one forward pass on this CPU with torch's present threads, or text such as "3ms". Timed
                now if `measure_latency` was not called.
            max_loss: Loss to stay below.
            pins: Name patterns or module types to the scheme that those modules must have; None for floating point.
            min_bits: No scheme with fewer weight bits.
            ends: Scheme of the first and the last unit; `hb.int8_weight_only()` is what most people mean.
            corrections: Rounds of measuring neighbours; 0 trusts the table.
            holdout: Other data on which the result is measured once more.

        Returns:
            A recipe for `quantize_` with what it is predicted and measured to cost.

        Raises:
            QuantizationError: no budget, budgets that cannot be kept (with the nearest that can), pins that name nothing,
                a scheme that was not measured, or each other's modules.
        """
        limits = self._limits(max_bytes, max_latency, max_loss)
        allowed = self._allowed(pins, min_bits, ends)
        choices = self._solve(allowed, limits, "bytes" if max_loss is not None else "loss")
        measured = None
        if self.session is not None:
            measured = self.session.measure(choices).loss
            if corrections > 0:
                choices, measured = correct(self, self.session, allowed, limits, choices, measured, corrections)
        held_out = self._held_out(choices, holdout) if holdout is not None else None
        return self._allocation(choices, limits, measured, held_out)

    def pareto(
        self,
        cost: Literal["bytes", "latency"] = "bytes",
        *,
        points: int = 16,
        pins: Mapping[Pattern, Scheme | None] | None = None,
        min_bits: int | None = None,
        ends: Scheme | None = None,
        measured: bool = False,
    ) -> Front:
        """The allocations that no other beats in both loss and cost, between the smallest and floating point.

        Args:
            cost: What is traded for loss.
            points: Budgets tried, evenly spaced on a logarithmic axis, besides those of the uniform schemes; each point is the
                exact optimum at its budget.
            pins, min_bits, ends: As in `allocate`.
            measured: Measure the loss of every point and of every uniform scheme, not only predict it.
        """
        if cost not in ("bytes", "latency"):
            raise ValueError(f"cost={cost!r} is unknown; use 'bytes' or 'latency'")
        if points < 2:
            raise ValueError(f"points={points} makes no front; use e.g. 16")
        if cost == "latency":
            self._need_latency()
        allowed = self._allowed(pins, min_bits, ends)
        problem, _ = self._problem(allowed)
        found: list[Allocation] = []
        for budget in self._budgets(problem, cost, points):
            choices = self._solve(allowed, {cost: budget}, "loss")
            loss = self.session.measure(choices).loss if measured and self.session is not None else None
            allocation = self._allocation(choices, {}, loss, None)
            if not found or allocation.choices != found[-1].choices:
                found.append(allocation)
        uniform = {
            key: self._allocation({n: key for n, row in self.entries.items() if key in row}, {}, loss, None)
            for key, loss in self.uniform_losses.items()
        }
        # One scheme everywhere is an allocation too, and its loss is known.
        found += [point for key, point in uniform.items() if all(key in keys for keys in allowed.values())]
        uniform[FLOAT] = self._allocation({}, {}, 0.0 if self.loss_name in ("kl", "mse") else None, None)
        return Front(cost=cost, points=tuple(found), uniform=uniform, loss_name=self.loss_name).without_dominated()

    def measure_latency(self, batch: object | None = None, *, seconds: float = 20.0, progress: bool = True) -> Latency:
        """Times every candidate inside the model on this CPU, with torch's present number of threads.

        Args:
            batch: The input whose latency counts; default: the first batch of the data.
            seconds: Time to spend at most.
            progress: Show a progress bar on stderr.
        """
        session = self._need_session("time the model")
        self.latency = measure_latency(
            session.bench,
            session.batches[0] if batch is None else batch,
            forward=session.forward,
            seconds=seconds,
            progress=progress,
        )
        return self.latency

    def predicted_loss(self, choices: Choices) -> float:
        """The loss that the table predicts of a configuration: unit name to key; units left out are in floating point."""
        return self._curve()(self.score(choices))

    def score(self, choices: Choices) -> float:
        """Sum of the entries' losses: what the solver minimises."""
        return sum(max(row[choices.get(name, FLOAT)].loss, 0.0) for name, row in self.entries.items())

    def bytes_of(self, choices: Choices) -> int:
        """Bytes of the whole model under a configuration, as saved."""
        return self.rest_bytes + sum(row[choices.get(name, FLOAT)].bytes for name, row in self.entries.items())

    def tells_apart(self, unit: str) -> bool:
        """Whether the smallest and the largest loss of a unit's schemes differ by more than their margins."""
        row = [entry for key, entry in self.entries[unit].items() if key != FLOAT]
        low, high = min(row, key=lambda e: e.loss), max(row, key=lambda e: e.loss)
        return high.loss - low.loss > math.hypot(low.margin, high.margin)

    def cost_of(self, choices: Choices) -> dict[str, float]:
        """Predicted costs of a configuration by name: score, bytes and, if timed, latency."""
        costs = {"loss": self.score(choices), "bytes": float(self.bytes_of(choices))}
        if self.latency is not None:
            costs["latency"] = self.latency.of(choices)
        return costs

    def release(self) -> None:
        """Lets go of the model and of all candidates; what is in the table stays."""
        self.session = None

    def _curve(self) -> LossCurve:
        scores = {key: self.score(self._uniform(key)) for key in self.uniform_losses}
        return LossCurve.through([(scores[key], loss) for key, loss in self.uniform_losses.items()])

    def _uniform(self, key: str) -> dict[str, str]:
        return {name: key for name, row in self.entries.items() if key in row}

    def _allowed(
        self, pins: Mapping[Pattern, Scheme | None] | None, min_bits: int | None, ends: Scheme | None
    ) -> dict[str, list[str]]:
        modules = None if self.session is None else self.session.bench.float_modules
        return allowed_candidates(self.units, self.schemes, self.entries, pins or {}, min_bits, ends, modules)

    def _limits(
        self, max_bytes: int | str | None, max_latency: Seconds | None, max_loss: float | None
    ) -> dict[str, float]:
        limits: dict[str, float] = {}
        if max_bytes is not None:
            limits["bytes"] = parse_quantity(max_bytes, "max_bytes", {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9})
        if max_latency is not None:
            limits["latency"] = parse_quantity(max_latency, "max_latency", {"s": 1, "ms": 1e-3, "us": 1e-6})
            self._need_latency()
        if max_loss is not None:
            if not math.isfinite(max_loss) or max_loss < 0:
                raise ValueError(f"max_loss={max_loss} is not a positive number")
            limits["loss"] = self._curve().inverse(max_loss)
        if not limits:
            raise ValueError("no budget: give max_bytes, max_latency or max_loss")
        return limits

    def _problem(
        self, allowed: Mapping[str, Sequence[str]], losses: Scores | None = None
    ) -> tuple[Problem, list[tuple[str, str]]]:
        rows = [(i, unit.name, key) for i, unit in enumerate(self.units) for key in allowed[unit.name]]
        entries = [self.entries[name][key] for _, name, key in rows]
        costs = {
            "loss": np.array(
                [max(losses[name][key] if losses else self.entries[name][key].loss, 0.0) for _, name, key in rows]
            ),
            "bytes": np.array([float(entry.bytes) for entry in entries]),
        }
        if self.latency is not None:
            costs["latency"] = np.array([self.latency.units[name][key] for _, name, key in rows])
        return Problem(np.array([i for i, _, _ in rows]), costs), [(name, key) for _, name, key in rows]

    def _outside(self) -> dict[str, float]:
        """What the model costs besides its units."""
        return {"bytes": float(self.rest_bytes), "loss": 0.0, "latency": self.latency.rest if self.latency else 0.0}

    def _budgets(self, problem: Problem, cost: str, points: int) -> list[float]:
        """Totals from the smallest to the largest, closer together where they are small; the uniform schemes' own too."""
        starts = np.flatnonzero(np.diff(problem.unit, prepend=-1))
        low, high = (float(f.reduceat(problem.costs[cost], starts).sum()) for f in (np.minimum, np.maximum))
        rest = self._outside()[cost]
        own = [self.cost_of(self._uniform(key))[cost] for key in self.uniform_losses]
        spaced = np.geomspace(max(low, 1e-12), max(high, 1e-12), points) + rest
        return sorted({*map(float, spaced), *(each for each in own if low + rest <= each <= high + rest)})

    def _solve(
        self,
        allowed: Mapping[str, Sequence[str]],
        limits: Mapping[str, float],
        minimize: str,
        losses: Scores | None = None,
    ) -> dict[str, str]:
        """The optimum by the table's losses, or by other estimates of them."""
        problem, names = self._problem(allowed, losses)
        outside = self._outside()
        inner = {name: limit - outside[name] for name, limit in limits.items()}
        chosen = solve(problem, minimize, inner)
        if chosen is None:
            raise QuantizationError(self._infeasible(problem, inner, limits))
        return {names[i][0]: names[i][1] for i in chosen if names[i][1] != FLOAT}

    def _infeasible(self, problem: Problem, inner: Mapping[str, float], limits: Mapping[str, float]) -> str:
        """The nearest budgets that can be kept: each one's smallest value, the others kept where possible."""
        advice = []
        for name, limit in limits.items():
            others = {other: value for other, value in inner.items() if other != name}
            nearest = solve(problem, name, others) if others else solve(problem, name, {})
            if nearest is not None:
                reached = total(problem, nearest, name) + limit - inner[name]
                reached *= 1.0 if name == "bytes" else 1.001  # for the digits that are not shown
                advice.append(f"max_{name}={self._show(name, reached)} would do")
        asked = " and ".join(f"max_{name}={self._show(name, limit)}" for name, limit in limits.items())
        return f"no allocation keeps to {asked}; {', or '.join(advice) or 'not even one of them can be kept'}"

    def _show(self, name: str, value: float) -> str:
        if name == "bytes":
            return f"{math.ceil(value)}"
        return f"{value:.4g}" if name == "latency" else f"{self._curve()(value):.4g}"

    def _allocation(
        self, choices: Choices, limits: Mapping[str, float], measured: float | None, held_out: float | None
    ) -> Allocation:
        by_name = {unit.name: choices.get(unit.name, FLOAT) for unit in self.units}
        return Allocation(
            default=None,
            overrides={
                name: self.schemes[by_name[unit.name]]
                for unit in self.units
                for name in unit.modules
                if by_name[unit.name] != FLOAT
            },
            choices=by_name,
            bytes=self.bytes_of(choices),
            latency=None if self.latency is None else self.latency.of(choices),
            predicted_loss=self.predicted_loss(choices),
            measured_loss=measured,
            held_out_loss=held_out,
            loss_name=self.loss_name,
            limits={n: self._curve()(v) if n == "loss" else v for n, v in limits.items()},
            units=self.units,
        )

    def _held_out(self, choices: Choices, data: Data) -> float:
        session = self._need_session("measure on held-out data")
        batches = list(check_data(data))
        meter = session.meter.on(session.bench.apply({}), batches)
        return summarize(meter.values(session.bench.apply(choices))).loss

    def _need_session(self, purpose: str) -> Session:
        if self.session is None:
            raise QuantizationError(
                f"the table has no model to {purpose} (loaded from a file, or released); call hb.measure_sensitivity again"
            )
        return self.session

    def _need_latency(self) -> None:
        if self.latency is None:
            self.measure_latency(progress=False)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `SensitivityTable.from_dict` reads it back, without the model."""
        return to_fields(self)

    @staticmethod
    def from_dict(fields: Mapping[str, object]) -> SensitivityTable:
        """The table that `to_dict` described.

        Raises:
            FileFormatError: it describes something else.
        """
        return SensitivityTable(**from_fields(fields))  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> SensitivityTable:
        """Reads what `save` wrote.

        Raises:
            FileFormatError: the file is something else or damaged.
        """
        return SensitivityTable.from_dict(read_json(path))

    def _table(self) -> Table:
        keys = list(self.schemes)
        table = Table(["module", "weights", *short_labels(keys).values()], right=set(range(1, 2 + len(keys))))
        units = {unit.name: unit for unit in self.units}

        def cell(row: Mapping[str, Entry], key: str) -> str:
            return f"{row[key].loss:.2e}" if key in row else "-"

        for unit in self.units:
            name = unit.name if len(unit.modules) == 1 else f"{unit.name} (+{len(unit.modules) - 1})"
            table.add(name, f"{units[unit.name].weights:,}", *(cell(self.entries[unit.name], key) for key in keys))
        table.total("everywhere", "", *(f"{self.uniform_losses.get(key, math.nan):.2e}" for key in keys))
        return table

    def __str__(self) -> str:
        note = "".join(f"\nwarning: {text}" for text in self.warnings)
        return f"{self.loss_name} that each module adds, by scheme ({self.method})\n{self._table().to_text()}{note}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().to_html()
