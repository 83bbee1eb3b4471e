"""The models that the bit search is measured on, each with data to measure, calibrate and evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

import halfbyte as hb

from . import llama

__all__ = ["NAMES", "Case", "load"]

NAMES = ("novels5M", "stories260K")


@dataclass(frozen=True)
class Case:
    """A model and its data.

    Attributes:
        measuring: Batches to measure sensitivities on.
        calibration: Batches for roundings that look at data, or None.
        evaluation: Batches that the search never sees.
        timed: The input whose latency counts.
    """

    model: nn.Module
    schemes: Sequence[hb.Scheme]
    measuring: Sequence[object]
    evaluation: Sequence[object]
    timed: object
    calibration: Sequence[object] | None = None
    forward: Callable[[nn.Module, object], object] | None = None
    quality: Callable[[nn.Module], Mapping[str, object]] = field(default=lambda model: {})


def load(root: Path, name: str) -> Case:
    """One of `NAMES`."""
    return _language_model(root, name)


def _language_model(root: Path, name: str) -> Case:
    group = 32
    text = llama.load_text(root, name, rows=40, calibration_rows=16)
    batches = [{"input_ids": row[None], "use_cache": False} for row in text.calibration]
    return Case(
        model=llama.load_float(root, name),
        schemes=[hb.int_weight_only(bits, group_size=group) for bits in (8, 6, 4, 3, 2)],
        measuring=batches,
        evaluation=[{"input_ids": row[None], "use_cache": False} for row in text.evaluation],
        timed={"input_ids": text.evaluation[0][None, :64], "use_cache": False},
    )
