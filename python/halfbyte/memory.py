"""Memory: sizes as users write them, and what a conversion may hold beside the model."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TypeAlias

from halfbyte.errors import QuantizationError
from halfbyte.plan import Plan
from halfbyte.table import format_bytes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has both
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_M_MMAP_THRESHOLD = -3  # malloc.h
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


def keep_large_tensors_apart() -> None:
    """From now on tensors of 256 KB and more get memory of their own, which goes back to the system with them.

    glibc would take them from one heap as soon as one of their size was freed, and holes between them would add up. It holds
    for the whole process, and stays.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, 1 << 18)


def return_free_memory() -> None:
    """Gives free pages back to the system: glibc keeps them after large tensors of many sizes, and they add up."""
    if _trim is not None:
        _trim(0)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be held beside the model while it is converted; the rest waits in files.

    Attributes:
        staging: Bytes of finished weights.
        run: Bytes of hidden states between blocks, and of running a block on a batch; None for no limit.
    """

    staging: int
    run: int | None


def needed_bytes(made: Plan, *, calibration: int = 0, resident: int | None = None, hessian: bool = False) -> int:
    """The least memory a conversion takes, without what running the model takes.

    Beside the model, the layer at work is allowed one and a half times its float32 size (its codes, packed as they come, and
    bounded pieces of floats take less), or six times with Hessians: its target, errors and codes are whole.

    Args:
        made: The plan.
        calibration: Bytes that collecting statistics takes beside that.
        resident: Bytes of the model that are in memory at a time; None for all.
        hessian: Whether layers are rounded with Hessians.
    """
    largest = max((row.shape[0] * row.shape[1] * 4 for row in made.targets if row.shape is not None), default=0)
    work = largest * 6 if hessian else largest * 3 // 2
    return (made.bytes_before if resident is None else resident) + work + calibration


def conversion_budget(
    made: Plan,
    max_memory: MemorySize | None,
    *,
    calibration: int = 0,
    resident: int | None = None,
    hessian: bool = False,
    in_order: bool = False,
) -> Budget:
    """Divides what `max_memory` leaves.

    Args:
        made: The plan.
        max_memory: What the model and the work may take together.
        calibration, resident, hessian: As in `needed_bytes`.
        in_order: Whether hidden states are kept: two thirds are theirs then.

    Raises:
        QuantizationError: `max_memory` is less than what is needed; says how much that is.
    """
    largest = max(row.shape[0] * row.shape[1] * 4 for row in made.targets if row.shape is not None)
    if max_memory is None:
        return Budget(largest // 4, None)
    needed = needed_bytes(made, calibration=calibration, resident=resident, hessian=hessian)
    limit = parse_bytes(max_memory)
    if limit < needed:
        held = "the model" if resident is None else "a block and what is outside of blocks"
        size = format_bytes(made.bytes_before if resident is None else resident)
        raise QuantizationError(
            f"max_memory={max_memory!r} is too little: {held} ({size}) and the work on its "
            f"largest layer{' and its calibration' if calibration else ''} need {format_bytes(needed)}"
        )
    left = limit - needed
    if resident is not None:  # finished weights wait in files
        return Budget(0, left)
    return Budget(left // 3, left - left // 3) if in_order else Budget(left, None)
