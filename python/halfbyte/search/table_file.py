"""Sensitivity tables as JSON: what is in a file, and what may be wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import FileFormatError
from halfbyte.schemes import Scheme
from halfbyte.search.bench import FLOAT
from halfbyte.search.latency import Latency
from halfbyte.search.units import Entry, Unit

if TYPE_CHECKING:
    from halfbyte.search.table import SensitivityTable

_FORMAT = "halfbyte sensitivity table 1"


def to_fields(table: SensitivityTable) -> dict[str, object]:
    """A JSON-able description of a table, the model left out."""
    return {
        "format": _FORMAT,
        "units": [
            {"name": u.name, "modules": list(u.modules), "weights": u.weights, "table": u.table} for u in table.units
        ],
        "schemes": {key: scheme.to_dict() for key, scheme in table.schemes.items()},
        "entries": {
            name: {key: [e.loss, e.margin, e.bytes] for key, e in row.items()} for name, row in table.entries.items()
        },
        "rest_bytes": table.rest_bytes,
        "uniform_losses": table.uniform_losses,
        "loss": table.loss_name,
        "method": table.method,
        "latency": None if table.latency is None else table.latency.to_dict(),
        "warnings": table.warnings,
    }


def from_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of a `SensitivityTable` that `to_fields` described.

    Raises:
        FileFormatError: it describes something else.
    """
    if not isinstance(fields, Mapping) or fields.get("format") != _FORMAT:
        raise FileFormatError("this is not a sensitivity table of this version of halfbyte")
    try:
        return _read(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"the sensitivity table is damaged: {error!r}") from error


def read_json(path: str | Path) -> dict[str, object]:
    """The content of a JSON file.

    Raises:
        FileFormatError: the file is something else.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from error


def _read(fields: Mapping[str, object]) -> dict[str, object]:
    data = dict(fields)
    latency = data["latency"]
    units = tuple(
        Unit(name=u["name"], modules=tuple(u["modules"]), weights=int(u["weights"]), table=bool(u["table"]))
        for u in data["units"]  # type: ignore[attr-defined]
    )
    schemes = {key: Scheme.from_dict(scheme) for key, scheme in data["schemes"].items()}  # type: ignore[attr-defined]
    entries = {
        name: {key: Entry(float(v[0]), float(v[1]), int(v[2])) for key, v in row.items()}
        for name, row in data["entries"].items()  # type: ignore[attr-defined]
    }
    if list(entries) != [unit.name for unit in units]:
        raise ValueError("its entries are not those of its units")
    for name, row in entries.items():
        if FLOAT not in row or not schemes.keys() >= row.keys() - {FLOAT}:
            raise ValueError(f"the entries of {name} are not those of its schemes")
        if not all(math.isfinite(entry.loss) for entry in row.values()):
            raise ValueError(f"a loss of {name} is not finite")
    return {
        "units": units,
        "schemes": schemes,
        "entries": entries,
        "rest_bytes": int(data["rest_bytes"]),  # type: ignore[call-overload]
        "uniform_losses": dict(data["uniform_losses"]),  # type: ignore[call-overload]
        "loss_name": str(data["loss"]),
        "method": str(data["method"]),
        "latency": None if latency is None else Latency(**latency),  # type: ignore[arg-type]
        "warnings": list(data["warnings"]),  # type: ignore[call-overload]
    }
