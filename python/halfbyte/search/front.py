"""Pareto fronts: tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from halfbyte.search.allocation import Allocation
from halfbyte.search.bench import short_labels
from halfbyte.search.plots import plot_front
from halfbyte.table import Table, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Front:
    """Allocations in ascending order of cost, none beaten by another in both. Prints as a table; `plot` draws it.

    Attributes:
        cost: "bytes" or "latency".
        points: The allocations.
        uniform: Scheme in words to the allocation that has it everywhere, "float" included, for comparison.
        loss_name: What the losses are.
    """

    cost: Literal["bytes", "latency"]
    points: tuple[Allocation, ...]
    uniform: Mapping[str, Allocation]
    loss_name: str

    def without_dominated(self) -> Front:
        """The front without points that another beats in both."""
        kept: list[Allocation] = []
        for point in sorted(self.points, key=lambda p: (self.cost_of(p), p.loss)):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return replace(self, points=tuple(kept))

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "cost": self.cost,
            "loss": self.loss_name,
            "points": [point.to_dict() for point in self.points],
            "uniform": {key: point.to_dict() for key, point in self.uniform.items()},
        }

    def plot(
        self, path: str | Path | None = None, *, chosen: Allocation | None = None, axes: Axes | None = None
    ) -> Axes:
        """Draws loss against cost: the front, the uniform schemes, and a chosen point.

        Args:
            path: PNG, SVG or PDF to write.
            chosen: An allocation to mark.
            axes: matplotlib axes to draw into; default: new ones.

        Raises:
            ImportError: matplotlib is missing; it comes with the extra `plot`.
        """
        return plot_front(self, path, chosen, axes)

    def cost_of(self, point: Allocation) -> float:
        """Bytes or seconds of a point, whichever this front trades."""
        value = point.bytes if self.cost == "bytes" else point.latency
        assert value is not None
        return float(value)

    def _table(self) -> Table:
        table = Table(["", "size", "latency", "bits/weight", self.loss_name], right={1, 2, 3, 4})
        labels = short_labels(list(self.uniform))
        named = [point.choices for point in self.uniform.values()]
        rows = [("", point) for point in self.points if point.choices not in named] + [
            (f"all {labels[k]}", p) for k, p in self.uniform.items()
        ]
        for label, point in sorted(rows, key=lambda row: self.cost_of(row[1])):
            latency = "" if point.latency is None else f"{1e3 * point.latency:.3f} ms"
            loss = f"{point.loss:.3e}" if point.loss else "0"
            table.add(label or "searched", format_bytes(point.bytes), latency, f"{point.bits_per_weight:.2f}", loss)
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().to_html()
