"""Loaders for the real models and texts that the benchmarks and ``tests/models`` share.

The files are not part of the project. They live in ``shared/data`` beside (or above) the checkout, or in ``data`` of the
folder that ``HALFBYTE_SHARED`` names; everything that needs them says so and skips where they are absent.
"""

import os
from pathlib import Path
from typing import TypeVar

import torch
import transformers

__all__ = ["from_pretrained", "shared_data"]

_Model = TypeVar("_Model", bound=transformers.PreTrainedModel)

_REPOSITORY = Path(__file__).resolve().parents[2]


def shared_data() -> Path | None:
    """The folder with the shared models and data, or ``None`` where this machine has none."""
    if override := os.environ.get("HALFBYTE_SHARED"):
        candidates = [Path(override) / "data"]
    else:
        candidates = [folder / "shared" / "data" for folder in (_REPOSITORY, *_REPOSITORY.parents)]
    return next((folder for folder in candidates if (folder / "lm").is_dir()), None)


def from_pretrained(kind: type[_Model], folder: Path, **arguments: object) -> _Model:
    """``kind.from_pretrained`` in float32 from local files only, without its progress bar."""
    transformers.utils.logging.disable_progress_bar()
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **arguments)
