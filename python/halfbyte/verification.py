"""What `hb.verify` reports: the checks of each module and of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.errors import VerificationError
from halfbyte.table import Table, fold_by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleVerification:
    """One quantized module.

    Attributes:
        name: Qualified name.
        kernel: What computes it.
        calls: How often it ran; with 0, only its packing was checked.
        rows: Rows of input that were compared.
        same_everywhere: Equal bits on every ISA level, with every number of threads, and for a row alone or in its batch.
        integers: Integer products that were compared one by one with exact ones; those past 2^23 do not show in float32.
        integers_equal: Whether all of these agreed.
        worst_rounding: Largest difference from the exact result, as a part of what rounding in the documented order can
            reach; at most 1, or the module is wrong. 0 for tables, which must agree bit for bit.
        packing: Whether the packed codes, unpacked and packed again, give the same bytes, and lie in the format's range.
    """

    name: str
    kernel: str
    calls: int
    rows: int
    same_everywhere: bool
    integers: int
    integers_equal: bool
    worst_rounding: float
    packing: bool

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.same_everywhere and self.integers_equal and self.worst_rounding <= 1 and self.packing

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, "ok")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """One check of the whole model's output.

    Attributes:
        name: What was changed.
        passed: Whether every batch gave the same bits.
        note: What differed, or why a difference is not halfbyte's.
    """

    name: str
    passed: bool
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {"name": self.name, "passed": self.passed, "note": self.note}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found; prints as a table, shows as one in a notebook.

    Modules whose names differ only in numbers share a line of the table, with their counts summed and the worst rounding.

    Attributes:
        modules: One entry for each quantized module.
        checks: Checks of the whole model.
        levels: ISA levels of this CPU that were compared.
        threads: Numbers of threads that were compared.
        batches: Batches of data that were run.
        seconds: Wall time.
    """

    modules: tuple[ModuleVerification, ...]
    checks: tuple[ModelCheck, ...]
    levels: tuple[str, ...]
    threads: tuple[int, ...]
    batches: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """What failed, in words."""
        modules = tuple(f"{m.name}: {', '.join(_faults(m))}" for m in self.modules if not m.ok)
        return modules + tuple(f"model: {c.name}: {c.note}" for c in self.checks if not c.passed)

    @property
    def never_ran(self) -> tuple[str, ...]:
        """Names of modules that the data did not reach."""
        return tuple(m.name for m in self.modules if m.calls == 0)

    def raise_if_failed(self) -> None:
        """Raises if anything failed.

        Raises:
            VerificationError: with all failures.
        """
        if not self.ok:
            raise VerificationError("the model does not compute what its integers say:\n" + "\n".join(self.failures))

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "ok": self.ok,
            "levels": list(self.levels),
            "threads": list(self.threads),
            "batches": self.batches,
            "seconds": self.seconds,
            "modules": [m.to_dict() for m in self.modules],
            "checks": [c.to_dict() for c in self.checks],
            "never_ran": list(self.never_ran),
        }

    def _table(self) -> Table:
        table = Table(
            ["module", "kernel", "calls", "rows", "integers", "rounding / bound", "result"], right={2, 3, 4, 5}
        )

        def shown(m: ModuleVerification) -> tuple[str, str]:
            if not m.ok:
                return m.kernel, f"FAILED: {', '.join(_faults(m))}"
            return m.kernel, "ok" if m.calls else "never ran (packing ok)"

        for label, modules in fold_by_name(self.modules, lambda m: m.name, shown):
            kernel, result = shown(modules[0])
            integers = sum(m.integers for m in modules if m.integers_equal)
            worst = f"{max(m.worst_rounding for m in modules):.2f}" if modules[0].calls else ""
            calls, rows = sum(m.calls for m in modules), sum(m.rows for m in modules)
            table.add(label, kernel, str(calls), str(rows), f"{integers} equal" if integers else "", worst, result)
        for check in self.checks:
            result = "ok" if check.passed else "FAILED"
            table.add(f"(model) {check.name}", "", "", "", "", "", f"{result}: {check.note}" if check.note else result)
        threads = ", ".join(map(str, self.threads))
        where = f"levels {', '.join(self.levels)}; threads {threads}; {self.batches} batches; {self.seconds:.1f} s"
        table.total("all equal" if self.ok else "FAILED", "", "", "", "", "", where)
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def _faults(module: ModuleVerification) -> Iterator[str]:
    if not module.same_everywhere:
        yield "levels, threads or batch sizes differ"
    if not module.integers_equal:
        yield "integer products are wrong"
    if module.worst_rounding > 1:
        yield f"off by {module.worst_rounding:.3g} times the rounding bound"
    if not module.packing:
        yield "packing does not reproduce its codes"
