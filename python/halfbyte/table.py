"""Text and HTML tables: how plans, reports and comparisons show themselves."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


class Table:
    """Rows of strings under a header; columns in `right` are aligned to the right.

    Args:
        header: Column titles.
        right: Indices of right-aligned columns.
    """

    def __init__(self, header: list[str], right: set[int] | None = None) -> None:
        self._header = header
        self._right = right or set()
        self._rows: list[tuple[str, ...]] = []
        self._total: tuple[str, ...] | None = None

    def add(self, *cells: str) -> None:
        """Appends a row."""
        self._rows.append(cells)

    def total(self, *cells: str) -> None:
        """Sets the closing row."""
        self._total = cells

    def to_text(self) -> str:
        """Aligned plain text; empty columns are left out."""
        rows = [*self._rows, *([self._total] if self._total else [])]
        keep = [i for i in range(len(self._header)) if any(row[i] for row in rows)]
        widths = {i: max(len(self._header[i]), *(len(row[i]) for row in rows)) for i in keep} if rows else {}

        def line(cells: tuple[str, ...] | list[str]) -> str:
            parts = [cells[i].rjust(widths[i]) if i in self._right else cells[i].ljust(widths[i]) for i in keep]
            return "  ".join(parts).rstrip()

        rule = "  ".join("-" * widths[i] for i in keep)
        lines = [line(self._header), rule, *(line(row) for row in self._rows)]
        if self._total:
            lines += [rule, line(self._total)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """An HTML table, for notebooks."""

        def cells(row: tuple[str, ...] | list[str], tag: str) -> str:
            parts = []
            for i, text in enumerate(row):
                style = ' style="text-align:right"' if i in self._right else ' style="text-align:left"'
                parts.append(f"<{tag}{style}>{html.escape(text)}</{tag}>")
            return "<tr>" + "".join(parts) + "</tr>"

        body = "".join(cells(row, "td") for row in self._rows)
        foot = f"<tfoot>{cells(self._total, 'th')}</tfoot>" if self._total else ""
        return f"<table><thead>{cells(self._header, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"


def fold_by_name(
    items: Iterable[T], name_of: Callable[[T], str], key_of: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Gathers items whose names differ only in numbers and whose keys are equal: the layers of a model, most often.

    Args:
        items: In the order of the table.
        name_of: Qualified name of an item.
        key_of: What else must be equal.

    Returns:
        Label and items of each gathering, in the order of its first item.

    Example:
        >>> names = ["layers.0.fc", "layers.1.fc", "layers.2.fc", "head"]
        >>> [label for label, _ in fold_by_name(names, str, len)]
        ['layers.{0-2}.fc', 'head']
    """
    gathered: dict[Hashable, list[T]] = {}
    for item in items:
        gathered.setdefault((re.sub(r"\d+", "#", name_of(item)), key_of(item)), []).append(item)
    return [(_label([name_of(item) for item in group]), group) for group in gathered.values()]


def _label(names: list[str]) -> str:
    """One name for names that differ only in numbers."""
    if len(names) == 1:
        return names[0]
    texts, columns = re.split(r"\d+", names[0]), zip(*(re.findall(r"\d+", name) for name in names), strict=True)
    parts = [texts[0]]
    for text, column in zip(texts[1:], columns, strict=True):
        numbers = sorted({int(number) for number in column})
        if len(numbers) == 1:
            parts.append(str(numbers[0]))
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            parts.append(f"{{{numbers[0]}-{numbers[-1]}}}")
        else:
            parts.append("{" + ",".join(map(str, numbers)) + "}")
        parts.append(text)
    return "".join(parts)


def format_bytes(count: int) -> str:
    """`1234567` as `1.23 MB`; decimal units, as storage is sold and files are listed."""
    if count < 1000:
        return f"{count} B"
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if count < 1000 * size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e9:.2f} GB"
