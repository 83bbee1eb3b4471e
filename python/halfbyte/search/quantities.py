"""Budgets as people write them: "20MB", "3ms"."""

from __future__ import annotations

import math
from collections.abc import Mapping


def parse_quantity(value: float | str, name: str, units: Mapping[str, float]) -> float:
    """A number, or text such as "20MB" in one of `units`.

    Raises:
        ValueError: not a positive quantity; says what is accepted.
    """
    number, unit = value, ""
    if isinstance(value, str):
        text = value.strip().lower().replace(" ", "")
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
        number, unit = digits, text[len(digits) :]
    try:
        result = float(number) * (units[unit] if unit else 1.0)
    except (ValueError, KeyError, TypeError):
        result = math.nan
    if not math.isfinite(result) or result <= 0:
        raise ValueError(f"{name}={value!r} is not a positive quantity; units: {', '.join(units)}")
    return result
