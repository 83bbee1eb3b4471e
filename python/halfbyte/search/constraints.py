"""The user's word: which candidates of each unit may be taken at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from halfbyte.errors import QuantizationError
from halfbyte.recipe import Pattern, Recipe, matches, show_pattern
from halfbyte.schemes import Scheme
from halfbyte.search.bench import FLOAT, weight_bits
from halfbyte.search.units import Unit


def allowed_candidates(
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    entries: Mapping[str, Mapping[str, object]],
    pins: Mapping[Pattern, Scheme | None],
    min_bits: int | None,
    ends: Scheme | None,
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, list[str]]:
    """Keys that each unit may take.

    Args:
        units, schemes, entries: The table's.
        pins, min_bits, ends: As in `SensitivityTable.allocate`.
        modules: Name to float module, for pins that are module types.

    Raises:
        QuantizationError: a pin that names no unit, a scheme that was not measured there, pins that contradict each other,
            a module type where there is no model.
        TypeError, ValueError: something that is no pattern, no scheme or no width.
    """
    Recipe(default=None, overrides=pins)  # checks patterns and schemes
    if min_bits is not None and not 1 <= min_bits <= 32:
        raise ValueError(f"min_bits={min_bits} is not a width of weights; use 1 to 8")
    allowed = {unit.name: list(entries[unit.name]) for unit in units}
    pinned: dict[str, tuple[str, str]] = {}  # unit -> key and the pin that asked for it
    if ends is not None:
        for unit in (units[0], units[-1]):
            _pin(pinned, unit, _key(ends, schemes, entries, unit, "ends"), "ends")
    for pattern, scheme in pins.items():
        shown = show_pattern(pattern)
        if not isinstance(pattern, str) and modules is None:
            raise QuantizationError(f"pin {shown} is a module type, and this table has no model; name modules instead")
        known = modules or {}
        matching = [unit for unit in units if any(matches(pattern, name, known.get(name)) for name in unit.modules)]
        if not matching:
            raise QuantizationError(f"pin {shown} matches no module that can be quantized")
        for unit in matching:
            _pin(pinned, unit, _key(scheme, schemes, entries, unit, shown), shown)
    for name, (key, _) in pinned.items():
        allowed[name] = [key]
    if min_bits is not None:
        for unit in units:
            if unit.name not in pinned:
                allowed[unit.name] = [key for key in allowed[unit.name] if weight_bits(schemes.get(key)) >= min_bits]
    return allowed


def _pin(pinned: dict[str, tuple[str, str]], unit: Unit, key: str, pattern: str) -> None:
    before = pinned.get(unit.name)
    if before is not None and before[0] != key:
        raise QuantizationError(
            f"{unit.name} is pinned twice: to {before[0]} by {before[1]} and to {key} by {pattern}; keep one"
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
        raise QuantizationError(f"pin {pattern} asks for {key}, which was not measured at {unit.name} ({measured})")
    return key
