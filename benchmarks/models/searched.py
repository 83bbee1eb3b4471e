"""The models that the bit search is measured on, each with data to measure, calibrate and evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import halfbyte as hb

from . import llama, vision

__all__ = ["NAMES", "Case", "load"]

_LANGUAGE_MODELS = ("novels5M", "stories260K")
NAMES = (*_LANGUAGE_MODELS, *vision.NAMES)


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
    return _language_model(root, name) if name in _LANGUAGE_MODELS else _classifier(root, name)


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


def _classifier(root: Path, name: str) -> Case:
    model = vision.load_float(root, name)
    data = vision.load_data(root, name, calibration=200, images=1000)
    batch = 20 if name == "Tiny-Darknet" else 100
    evaluation = list(data.images.split(batch))

    @torch.inference_mode()
    def quality(model: nn.Module) -> dict[str, object]:
        answers: Tensor = torch.cat([model(images).argmax(-1) for images in evaluation])
        return {"top1": float((answers == data.labels).float().mean())}

    return Case(
        model=model,
        schemes=[hb.int_weight_only(bits) for bits in (8, 6, 4, 3, 2)],
        measuring=list(data.calibration.split(batch)),
        evaluation=evaluation,
        timed=data.images[:1],
        quality=quality,
    )
