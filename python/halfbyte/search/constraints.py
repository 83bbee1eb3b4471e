"""The user's word: which candidates of each unit may be taken at all."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from halfbyte.errors import QuantizationError
from halfbyte.recipe import Pattern
from halfbyte.schemes import Scheme
from halfbyte.search.bench import FLOAT
from halfbyte.search.units import Unit


def allowed_candidates(
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    entries: Mapping[str, Mapping[str, object]],
    pins: Mapping[Pattern, Scheme | None],
    min_bits: int | None,
    ends: Scheme | None,
) -> dict[str, list[str]]:
    """Keys that each unit may take.

    Raises:
        QuantizationError: a pin that names no unit, a scheme that was not measured there, pins that contradict each other,
            a width that leaves nothing.
    """
    allowed = {unit.name: list(entries[unit.name]) for unit in units}
    pinned: dict[str, tuple[str, str]] = {}  # unit -> key and the pin that asked for it
    if ends is not None:
        for unit in (units[0], units[-1]):
            _pin(pinned, unit, _key(ends, schemes, entries, unit, "ends"), "ends")
    for pattern, scheme in pins.items():
        if not isinstance(pattern, str):
            raise TypeError(f"pin {pattern!r} is not a name pattern; name modules, such as 'lm_head' or '*.down_proj'")
        matching = [unit for unit in units if any(_matches(pattern, name) for name in unit.modules)]
        if not matching:
            raise QuantizationError(f"pin {pattern!r} matches no module that can be quantized")
        for unit in matching:
            _pin(pinned, unit, _key(scheme, schemes, entries, unit, pattern), pattern)
    for name, (key, _) in pinned.items():
        allowed[name] = [key]
    if min_bits is not None:
        for unit in units:
            if unit.name not in pinned:
                allowed[unit.name] = [key for key in allowed[unit.name] if _bits(schemes.get(key)) >= min_bits]
    return allowed


def _pin(pinned: dict[str, tuple[str, str]], unit: Unit, key: str, pattern: str) -> None:
    before = pinned.get(unit.name)
    if before is not None and before[0] != key:
        raise QuantizationError(
            f"{unit.name} is pinned twice: to {before[0]} by {before[1]!r} and to {key} by {pattern!r}; keep one"
        )
    pinned[unit.name] = key, pattern


def _key(
    scheme: Scheme | None,
    schemes: Mapping[str, Scheme],
    entries: Mapping[str, Mapping[str, object]],
    unit: Unit,
    pattern: str,
) -> str:
    key = FLOAT if scheme is None else str(scheme)
    if key not in entries[unit.name]:
        measured = ", ".join(entries[unit.name])
        raise QuantizationError(f"pin {pattern!r} asks for {key}, which was not measured at {unit.name} ({measured})")
    return key


def _bits(scheme: Scheme | None) -> int:
    if scheme is None:
        return 32
    bits = getattr(scheme.weight, "bits", 16)
    return bits if isinstance(bits, int) else 16


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
