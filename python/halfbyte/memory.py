"""Memory: sizes as users write them, and what a conversion may hold beside the model."""

from __future__ import annotations

import re
from typing import TypeAlias

from halfbyte.errors import QuantizationError
from halfbyte.plan import Plan
from halfbyte.table import format_bytes

MemorySize: TypeAlias = int | str
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(size: MemorySize) -> int:
    """Bytes of `size`, an integer or a string such as "6GB" or "512MiB".

    Raises:
        ValueError: not a size.

    Example:
        >>> parse_bytes("1.5GB")
        1500000000
    """
    if isinstance(size, bool):
        raise TypeError(f"{size!r} is not a size; use bytes or a string such as '6GB'")
    if isinstance(size, int):
        number, unit = float(size), ""
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{size!r} is not a size; use bytes or a string such as '6GB' or '512MiB'")
        number, unit = float(match[1]), match[2].upper()
    if number <= 0:
        raise ValueError(f"{size!r} is not a positive size")
    return int(number * _UNITS[unit])


def conversion_budget(made: Plan, max_memory: MemorySize | None, *, calibration: int = 0) -> int:
    """Bytes of finished weights that may wait in memory while a model is converted; the rest waits in a file.

    Beside the model, the layer at work is allowed one and a half times its float32 size; its codes, packed as they come, and
    bounded pieces of floats take less.

    Args:
        made: The plan.
        max_memory: What the model and the work may take together.
        calibration: Bytes that collecting statistics takes beside that.

    Raises:
        QuantizationError: `max_memory` is less than the model and that layer; says what is needed.
    """
    largest = max(row.shape[0] * row.shape[1] * 4 for row in made.targets if row.shape is not None)
    if max_memory is None:
        return largest // 4
    needed = made.bytes_before + largest * 3 // 2 + calibration
    limit = parse_bytes(max_memory)
    if limit < needed:
        raise QuantizationError(
            f"max_memory={max_memory!r} is too little: the model ({format_bytes(made.bytes_before)}) and the work on its "
            f"largest layer{' and its calibration' if calibration else ''} need {format_bytes(needed)}"
        )
    return limit - needed
