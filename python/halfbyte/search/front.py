"""Pareto fronts: tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from halfbyte.search.allocation import Allocation
from halfbyte.search.bench import FLOAT
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
        for point in sorted(self.points, key=lambda p: (self._cost(p), p.loss)):
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
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'halfbyte[plot]'") from error
        figure = None
        if axes is None:
            figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        scale, unit = (1e-6, "MB") if self.cost == "bytes" else (1e3, "ms")
        xs, ys = [scale * self._cost(p) for p in self.points], [p.loss for p in self.points]
        axes.plot(xs, ys, "o-", color="tab:blue", label="searched", zorder=3)
        named = {key: point for key, point in self.uniform.items() if key != FLOAT}
        axes.plot(
            [scale * self._cost(p) for p in named.values()],
            [p.loss for p in named.values()],
            "s",
            color="tab:gray",
            label="one scheme everywhere",
        )
        for key, point in named.items():
            axes.annotate(key, (scale * self._cost(point), point.loss), (4, 4), textcoords="offset points", fontsize=7)
        if FLOAT in self.uniform:
            axes.axvline(scale * self._cost(self.uniform[FLOAT]), color="tab:gray", linestyle=":", label="float")
        if chosen is not None:
            axes.plot(
                [scale * self._cost(chosen)], [chosen.loss], "*", ms=15, color="tab:red", label="chosen", zorder=4
            )
        if all(y > 0 for y in ys):
            axes.set_yscale("log")
        axes.set_xlabel(f"{'size' if self.cost == 'bytes' else 'latency of one pass'} ({unit})")
        axes.set_ylabel(
            {"kl": "KL to float (nats)", "mse": "relative squared error"}.get(self.loss_name, self.loss_name)
        )
        axes.grid(alpha=0.3)
        axes.legend()
        if path is not None:
            axes.get_figure().savefig(path, dpi=150)  # type: ignore[union-attr]
            if figure is not None:
                plt.close(figure)
        return axes

    def _cost(self, point: Allocation) -> float:
        value = point.bytes if self.cost == "bytes" else point.latency
        assert value is not None
        return float(value)

    def _table(self) -> Table:
        table = Table(["", "size", "latency", "bits/weight", self.loss_name], right={1, 2, 3, 4})
        rows = [("", point) for point in self.points] + [(f"all {key}", p) for key, p in self.uniform.items()]
        for label, point in sorted(rows, key=lambda row: self._cost(row[1])):
            latency = "" if point.latency is None else f"{1e3 * point.latency:.3f} ms"
            loss = f"{point.loss:.3e}" if point.loss else "0"
            table.add(label or "searched", format_bytes(point.bytes), latency, f"{point.bits_per_weight:.2f}", loss)
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().to_html()
