"""What a plan is: one row a module, made by `planning.py` before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.fallback import Fallback
from halfbyte.ops import Layout
from halfbyte.schemes import Scheme
from halfbyte.table import Table, fold_by_name, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """What one module gets.

    Attributes:
        name: Qualified name; `aliases` are the other names of the same module.
        module_type: Class name; that of the whole for a part.
        scheme: Resolved scheme, or None where the module stays as it is.
        reason: Why it stays in floating point, or why the scheme is not simply the recipe's; may be empty.
        shape: `(O, I)` of the weight of a Linear or Embedding, or of the matrix of a convolution (I = taps * channels).
        layout: Layout of the packed weight.
        tied_to: Name of the module whose packed weight this one shares.
        part_of: Name of the module that this layer is a part of, where one with several weights (an LSTM) is quantized.
        bytes_before: Parameters and buffers it owns, those shared with an earlier row not counted again.
        bytes_after: The same after conversion, scales, zero points and padding included.
        kernel: Operator, widths and ISA level that will run.
        fallbacks: Where the scheme departs from what was asked.
    """

    name: str
    module_type: str
    scheme: Scheme | None
    reason: str
    shape: tuple[int, int] | None
    bytes_before: int
    bytes_after: int
    kernel: str
    layout: Layout = "tiles"
    tied_to: str | None = None
    part_of: str | None = None
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def format_text(self) -> str:
        """The scheme in words; a table has no activations to speak of."""
        if self.scheme is None:
            return "as is"
        is_table = self.kernel.startswith("gather")
        return str(self.scheme.weight).replace("per channel", "per row") if is_table else str(self.scheme)

    @property
    def note(self) -> str:
        """Tie, reason and fallbacks in words."""
        tie = [f"tied to {self.tied_to}"] if self.tied_to else []
        reason = [self.reason] if self.reason else []
        return "; ".join([*tie, *reason, *(f.message for f in self.fallbacks)])

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "name": self.name,
            "module_type": self.module_type,
            "scheme": None if self.scheme is None else self.scheme.to_dict(),
            "reason": self.reason,
            "shape": None if self.shape is None else list(self.shape),
            "tied_to": self.tied_to,
            "part_of": self.part_of,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "kernel": self.kernel,
            "fallbacks": [f.to_dict() for f in self.fallbacks],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What carrying out a plan takes on this machine. Times are estimates, good to about a factor of two.

    Attributes:
        tokens: Of calibration data.
        peak_bytes: The least `max_memory` of `quantize_`; running a block on a batch comes on top.
        streamed_peak_bytes: The same of `quantize_checkpoint`; None where the model has no repeated blocks.
        hidden_bytes: Hidden states between blocks: in memory, or in a temporary file past `max_memory`.
        seconds: By kind of work. Transforms, such as AWQ, are not counted.
    """

    tokens: int
    peak_bytes: int
    streamed_peak_bytes: int | None
    hidden_bytes: int
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """Of all kinds of work."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        streamed = "" if self.streamed_peak_bytes is None else f" ({format_bytes(self.streamed_peak_bytes)} from files)"
        hidden = f", hidden states {format_bytes(self.hidden_bytes)}" if self.hidden_bytes else ""
        parts = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in self.seconds.items())
        return f"{self.tokens} tokens: memory {format_bytes(self.peak_bytes)}{streamed}{hidden}; time about {parts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `quantize_` will do to a model. Accepted wherever a recipe is; prints as a table.

    Attributes:
        rows: One for every module that owns parameters or buffers.
        work: What it takes, if `plan` was asked for that.
    """

    rows: tuple[PlanRow, ...]
    work: Work | None = None

    @property
    def targets(self) -> Iterator[PlanRow]:
        """Rows of the modules that will be converted."""
        return (row for row in self.rows if row.scheme is not None)

    @property
    def taken_apart(self) -> set[str]:
        """Names of the modules with several weights whose parts are rows of their own."""
        return {row.part_of for row in self.rows if row.part_of is not None}

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers, each counted once."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors after conversion, as `save` writes them."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every departure from what was asked."""
        return tuple(f for row in self.rows for f in row.fallbacks)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "rows": [row.to_dict() for row in self.rows],
            "work": None if self.work is None else self.work.to_dict(),
        }

    def _table(self) -> Table:
        table = Table(["module", "type", "format", "before", "after", "kernel", "note"], right={3, 4})

        def shown(row: PlanRow) -> tuple[str, ...]:
            return row.module_type, row.format_text, row.kernel, row.note

        for label, rows in fold_by_name(self.rows, lambda row: row.name, shown):
            module_type, format_text, kernel, note = shown(rows[0])
            before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
            table.add(
                label or "(model)", module_type, format_text, format_bytes(before), format_bytes(after), kernel, note
            )
        ratio = f"{self.bytes_before / self.bytes_after:.2f}x smaller" if self.bytes_after else ""
        table.total("total", "", "", format_bytes(self.bytes_before), format_bytes(self.bytes_after), "", ratio)
        return table

    def __str__(self) -> str:
        return self._table().to_text() + ("" if self.work is None else f"\n{self.work}")

    def _repr_html_(self) -> str:
        return self._table().to_html() + ("" if self.work is None else f"<p>{self.work}</p>")
