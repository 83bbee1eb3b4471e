"""Float checkpoints as Hugging Face writes them: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.errors import FileFormatError
from halfbyte.io.container import Reader, StoredTensor

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Tensors by name, read one at a time.

    Args:
        source: A safetensors file, several, an index (`*.safetensors.index.json`), or a folder with an index or with
            safetensors files.

    Raises:
        FileFormatError: a shard is missing, damaged, or no safetensors file; or two shards have one tensor.
        OSError: a file cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        self.files = _files(source)
        self._places: dict[str, Path] = {}
        self._tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            try:
                with Reader(path) as reader:
                    stored = reader.tensors
            except FileFormatError as error:
                raise FileFormatError(f"cannot read {path}: {error}") from error
            for name, tensor in stored.items():
                if name in self._places:
                    raise FileFormatError(f"{name} is in both {self._places[name]} and {path}; give one checkpoint")
                self._places[name] = path
                self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name].shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in memory of its own, as `dtype`."""
        with Reader(self._places[name]) as reader:
            return reader.read(name).to(dtype)

    @property
    def identity(self) -> list[tuple[str, int, str]]:
        """What tells this checkpoint from others without reading it: name, size and tensors of each file."""
        return [
            (p.name, p.stat().st_size, repr([(n, self._tensors[n]) for n, at in self._places.items() if at == p]))
            for p in self.files
        ]


def _files(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(source, str | os.PathLike):
        return [Path(path) for path in source]
    path = Path(source)
    if path.is_dir():
        if not (path / _INDEX).exists():
            found = sorted(path.glob("*.safetensors"))
            if not found:
                raise FileFormatError(f"{path} has no *.safetensors; give a folder or a file that has")
            return found
        path = path / _INDEX
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted({str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f'{path} is no index of shards, {{"weight_map": {{...}}}} ({error!r})') from error
    missing = [name for name in names if not (path.parent / name).exists()]
    if missing:
        raise FileFormatError(f"{path} names {missing[0]!r}, which is not there; get all shards")
    return [path.parent / name for name in names]
