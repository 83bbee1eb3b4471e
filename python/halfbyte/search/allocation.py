"""A recipe that a search found, with what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.recipe import Recipe
from halfbyte.search.bench import FLOAT, weight_bits
from halfbyte.search.plots import plot_bits
from halfbyte.search.units import Unit
from halfbyte.table import Table, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Allocation(Recipe):
    """A scheme for every module: a `Recipe` for `quantize_`, `prepare_` and `plan`. Prints as a table.

    Attributes:
        choices: Unit name to the key of its scheme, or "float".
        bytes: Of the whole model as saved, less the header of the file.
        latency: Predicted seconds of one forward pass, or None if nothing was timed.
        predicted_loss: What the sensitivities add up to.
        measured_loss: Of this very mixture, or None if the model was not at hand.
        held_out_loss: The same on other data, if any was given.
        loss_name: What the losses are.
        limits: The budgets it was made for.
    """

    choices: Mapping[str, str]
    bytes: int
    latency: float | None
    predicted_loss: float
    measured_loss: float | None
    held_out_loss: float | None = None
    loss_name: str = "kl"
    limits: Mapping[str, float] = field(default_factory=dict)
    units: tuple[Unit, ...] = field(default=(), repr=False)

    @property
    def loss(self) -> float:
        """The measured loss where there is one, else the predicted."""
        return self.predicted_loss if self.measured_loss is None else self.measured_loss

    @property
    def bits_per_weight(self) -> float:
        """Weight bits of the units, averaged over weights; scales and zero points not counted. Floating point counts as 32."""
        weights = sum(unit.weights for unit in self.units)
        bits = sum(self.bits_of(unit) * unit.weights for unit in self.units)
        return bits / weights if weights else 0.0

    def bits_of(self, unit: Unit) -> int:
        """Weight bits of a unit; floating point counts as 32."""
        return weight_bits(self.overrides.get(unit.modules[0]))

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "choices": dict(self.choices),
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "latency": self.latency,
            "predicted_loss": self.predicted_loss,
            "measured_loss": self.measured_loss,
            "held_out_loss": self.held_out_loss,
            "loss": self.loss_name,
            "limits": dict(self.limits),
        }

    def plot(self, path: str | Path | None = None, *, axes: Axes | None = None) -> Axes:
        """Draws the bits of every module, in the order of the model.

        Args:
            path: PNG, SVG or PDF to write.
            axes: matplotlib axes to draw into; default: new ones.

        Raises:
            ImportError: matplotlib is missing; it comes with the extra `plot`.
        """
        return plot_bits(self, path, axes)

    def slack(self) -> dict[str, float]:
        """By what part of each budget the allocation stays below it; the held-out loss counts where there is one."""
        loss = self.loss if self.held_out_loss is None else self.held_out_loss
        costs = {"bytes": float(self.bytes), "latency": self.latency, "loss": loss}
        return {
            name: 1 - value / limit
            for name, limit in self.limits.items()
            if (value := costs[name]) is not None and limit
        }

    def _table(self) -> Table:
        table = Table(["module", "weights", "scheme", "bits"], right={1, 3})
        for unit in self.units:
            key = self.choices[unit.name]
            bits = self.bits_of(unit)
            table.add(unit.name, f"{unit.weights:,}", key, f"{bits:2d} {'▇' * (bits if key != FLOAT else 16)}")
        summary = [format_bytes(self.bytes), f"{self.loss_name} {self.loss:.3e}"]
        if self.latency is not None:
            summary.append(f"{1e3 * self.latency:.3f} ms")
        if self.held_out_loss is not None:
            summary.append(f"held out {self.held_out_loss:.3e}")
        table.total(
            "total", f"{sum(u.weights for u in self.units):,}", ", ".join(summary), f"{self.bits_per_weight:.2f}"
        )
        return table

    def __str__(self) -> str:
        slack = "".join(
            f"\nmax_{name}={self.limits[name]:.6g}: {'kept with' if part >= 0 else 'MISSED by'} {abs(100 * part):.1f} %"
            for name, part in self.slack().items()
        )
        return self._table().to_text() + slack

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self._table().to_html()
