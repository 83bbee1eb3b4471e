"""The models that the bit search is measured on, each with data to measure, calibrate and evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        log_probs: `[positions, classes]` of a model on evaluation data that the search never sees.
        labels: The right classes of those, if accuracy counts.
        timed: The input whose latency counts.
    """

    model: nn.Module
    schemes: Sequence[hb.Scheme]
    measuring: Sequence[object]
    log_probs: Callable[[nn.Module], Tensor]
    timed: object
    labels: Tensor | None = None


def load(root: Path, name: str) -> Case:
    """One of `NAMES`."""
    return _language_model(root, name) if name in _LANGUAGE_MODELS else _classifier(root, name)


def _language_model(root: Path, name: str) -> Case:
    text = llama.load_text(root, name, rows=40, calibration_rows=16)
    return Case(
        model=llama.load_float(root, name),
        schemes=[hb.int_weight_only(bits, group_size=32) for bits in (8, 6, 4, 3, 2)],
        measuring=[{"input_ids": row[None], "use_cache": False} for row in text.calibration],
        log_probs=lambda model: torch.cat(llama.log_probs(model, text.evaluation)),
        timed={"input_ids": text.evaluation[0][None, :64], "use_cache": False},
    )


def _classifier(root: Path, name: str) -> Case:
    large = name == "Tiny-Darknet"  # a hundred times the operations of the others
    evaluated, batch = (400, 5) if large else (1000, 100)
    widths = (8, 6, 4, 3, 2)
    if name == "ResNet-20":
        widths = (
            8,
            6,
            5,
            4,
            3,
        )  # at 2 bits an output channel it guesses; between 4 and 6 lies most of what it can give up
        # Its calibration images are training images, on which it is so sure that errors hardly show: KL is a tenth.
        data = vision.load_data(root, name, calibration=0, images=evaluated + 200)
        measuring, images, labels = data.images[evaluated:], data.images[:evaluated], data.labels[:evaluated]
    else:
        data = vision.load_data(root, name, calibration=100 if large else 200, images=evaluated)
        measuring, images, labels = data.calibration, data.images, data.labels
    return Case(
        model=vision.load_float(root, name),
        schemes=[hb.int_weight_only(bits) for bits in widths],
        measuring=list(measuring.split(batch)),
        log_probs=lambda model: vision.logits(model, images, batch=batch).log_softmax(-1),
        timed=images[:1],
        labels=labels,
    )
