"""Reports: what happened to each module, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.activation import ActivationRange
from halfbyte.algorithms import TransformRecord
from halfbyte.fallback import Fallback
from halfbyte.plan import Plan, PlanRow
from halfbyte.table import Table, fold_by_name, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """One module.

    Attributes:
        plan: Its row of the plan: scheme, bytes, kernel, reason.
        rounding: Name of the algorithm that chose its integers; empty where it stays in floating point.
        relative_error: `‖W - Ŵ‖ / ‖W‖` of its weight, Frobenius norms; None where it stays in floating point.
        seconds: Time its weight took.
        fallbacks: Departures from what was asked, those found in the plan and those found at work.
        activation: Range of its inputs, where activations are static.
    """

    plan: PlanRow
    rounding: str = ""
    relative_error: float | None = None
    seconds: float = 0.0
    fallbacks: tuple[Fallback, ...] = ()
    activation: ActivationRange | None = None

    @property
    def name(self) -> str:
        """Qualified name."""
        return self.plan.name

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise of the weight in dB: `-20 log10(relative_error)`; inf if nothing was lost."""
        if self.relative_error is None:
            return None
        return math.inf if self.relative_error == 0 else -20 * math.log10(self.relative_error)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            **self.plan.to_dict(),
            "rounding": self.rounding,
            "relative_error": self.relative_error,
            "sqnr_db": self.sqnr_db,
            "seconds": self.seconds,
            "fallbacks": [f.to_dict() for f in self.fallbacks],
            "activation": None if self.activation is None else self.activation.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `quantize_` and `convert_` return; prints as a table, shows as one in a notebook.

    Modules whose names differ only in numbers share a line of the table, with their bytes summed and the worst error.

    Attributes:
        modules: One entry for every module that owns parameters or buffers.
        bytes_before: All parameters and buffers before, each counted once.
        bytes_after: The same after: what `save` writes, less its header.
        seconds: Wall time of the whole call.
        calibration_batches: Batches of data that were run.
        transforms: What changed the float model before, and where it could not be changed.
    """

    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration_batches: int = 0
    transforms: tuple[TransformRecord, ...] = ()

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every departure from what was asked."""
        of_transforms = (f for record in self.transforms if (f := record.fallback) is not None)
        return (*of_transforms, *(f for module in self.modules for f in module.fallbacks))

    @property
    def plan(self) -> Plan:
        """The plan that was carried out."""
        return Plan(rows=tuple(module.plan for module in self.modules))

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
            "calibration_batches": self.calibration_batches,
            "transforms": [record.to_dict() for record in self.transforms],
            "modules": [module.to_dict() for module in self.modules],
            "fallbacks": [f.to_dict() for f in self.fallbacks],
        }

    def _table(self) -> Table:
        static = any(module.activation for module in self.modules)
        header = ["module", "type", "format", "rounding", "before", "after", "rel. error", "SQNR dB"]
        table = Table([*header, *(["input range"] if static else []), "note"], right={4, 5, 6, 7})

        def shown(module: ModuleReport) -> tuple[str, ...]:
            return module.plan.module_type, module.plan.format_text, module.rounding, module.plan.note

        for label, modules in fold_by_name(self.modules, lambda module: module.name, shown):
            module_type, format_text, rounding, note = shown(modules[0])
            worst = max(modules, key=lambda module: module.relative_error or 0.0)  # of several, the worst is shown
            table.add(
                label or "(model)",
                module_type,
                format_text,
                rounding,
                format_bytes(sum(module.plan.bytes_before for module in modules)),
                format_bytes(sum(module.plan.bytes_after for module in modules)),
                "" if worst.relative_error is None else f"{worst.relative_error:.2e}",
                "" if worst.sqnr_db is None else f"{worst.sqnr_db:.1f}",
                *([_range_text(modules)] if static else []),
                note,
            )
        ratio = f"{self.bytes_before / self.bytes_after:.2f}x smaller, " if self.bytes_after else ""
        after = format_bytes(self.bytes_after)
        empty = [""] * (3 if static else 2)
        table.total("total", "", "", "", format_bytes(self.bytes_before), after, *empty, f"{ratio}{self.seconds:.2f} s")
        return table

    def _transforms_text(self) -> str:
        """A line for each transform."""
        lines = []
        for name in dict.fromkeys(record.transform for record in self.transforms):
            done = [r for r in self.transforms if r.transform == name and not r.reason]
            failed = sum(r.failed for r in self.transforms if r.transform == name)
            change = max((r.change or 0.0 for r in done), default=0.0)
            places = (
                f"changed {len(done)} places, the float model's output by at most {change:.1e} of its largest value"
            )
            lines.append(f"{name} {places}" + (f"; {failed} failed" if failed else ""))
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(filter(None, [self._table().to_text(), self._transforms_text()]))

    def _repr_html_(self) -> str:
        return self._table().to_html()


def _range_text(modules: Sequence[ModuleReport]) -> str:
    """The range of inputs, that of several together; ~ where it had not settled."""
    ranges = [module.activation for module in modules if module.activation is not None]
    if not ranges:
        return ""
    unsettled = "" if all(found.converged for found in ranges) else "~"
    return f"{unsettled}{min(found.low for found in ranges):.3g} to {max(found.high for found in ranges):.3g}"
