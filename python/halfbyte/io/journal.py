"""The state folder of a quantization: what is finished, so that it can go on after an interrupt.

A run is a number of steps, one a block. `step-00007.safetensors` holds the results of a step under the names of its layers, and
a JSON record for each; `flow-00007/` the hidden states that leave it, one file a batch. Every file is written under another
name, flushed to disk and renamed, the one with the results last: a step is finished or it is not, whenever the process
was killed. `run.json` says which run the folder belongs to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte._extension import __version__
from halfbyte.errors import QuantizationError
from halfbyte.io.container import Reader, write_file

_RECORDS = "records"


class Journal:
    """A state folder.

    Args:
        folder: Made if it is not there.
        run: Describes the run; a folder of another one is refused.

    Raises:
        QuantizationError: the folder belongs to another run.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, str]) -> None:
        self.folder = folder
        described = {"halfbyte_version": __version__, **run}
        if folder.exists() and not folder.is_dir():
            raise QuantizationError(f"{folder} is a file, and no state folder; name another one")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if path.exists():
            self._check(json.loads(path.read_text(encoding="utf-8")), described)
        elif any(folder.iterdir()):
            raise QuantizationError(f"{folder} is not empty and is no state folder; name another one")
        else:
            temporary = folder / "run.json.tmp"
            temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
            temporary.replace(path)
        self._pending: dict[str, tuple[dict[str, Tensor], dict[str, object]]] = {}
        self.finished = 0
        while self._step(self.finished).exists():
            self.finished += 1

    def _check(self, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        different = sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
        if different:
            raise QuantizationError(
                f"{self.folder} belongs to another run: its {', '.join(different)} differ; name another folder, or delete it"
            )

    def add(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
        """Results of the step at work; what is added under one name comes together."""
        held, noted = self._pending.get(name, ({}, {}))
        self._pending[name] = (held | dict(tensors), noted | dict(record))

    def finish(self, step: int) -> None:
        """Writes what was added: the step is finished, and the flow into the one before it no longer needed.

        Raises:
            OSError: the disk is full; the steps before are kept.
        """
        tensors = {
            f"{name}/{key}": tensor.contiguous()
            for name, (held, _) in self._pending.items()
            for key, tensor in held.items()
        }
        records = {name: record for name, (_, record) in self._pending.items()}
        write_file(self._step(step), tensors, {_RECORDS: json.dumps(records, sort_keys=True)})
        self._pending.clear()
        self.finished = step + 1
        shutil.rmtree(self._flow(step - 2), ignore_errors=True)  # another process may be a step behind

    def records(self, step: int) -> dict[str, dict[str, object]]:
        """Records of a finished step by name."""
        with Reader(self._step(step)) as reader:
            loaded: dict[str, dict[str, object]] = json.loads(reader.metadata[_RECORDS])
            return loaded

    def tensors(self, step: int, *, mapped: bool = False) -> dict[str, dict[str, Tensor]]:
        """Tensors of a finished step by name; `mapped` ones are pages of the file, which is not to be changed meanwhile."""
        found: dict[str, dict[str, Tensor]] = {}
        if mapped:
            with safe_open(self._step(step), framework="pt") as file:
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        else:
            with Reader(self._step(step)) as reader:
                flat = {key: reader.read(key) for key in reader.tensors}
        for key, tensor in flat.items():
            name, _, kind = key.rpartition("/")
            found.setdefault(name, {})[kind] = tensor
        return found

    def save_flow(self, step: int, batch: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what leaves a step, for one batch."""
        folder = self._flow(step)
        folder.mkdir(exist_ok=True)
        write_file(
            folder / f"{batch:06d}.safetensors", {k: t.contiguous() for k, t in tensors.items()}, {"batch": str(batch)}
        )

    def flow(self, step: int, batch: int) -> dict[str, Tensor]:
        """What `save_flow` kept."""
        with Reader(self._flow(step) / f"{batch:06d}.safetensors") as reader:
            return {name: reader.read(name) for name in reader.tensors}

    def delete(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _step(self, step: int) -> Path:
        return self.folder / f"step-{step:05d}.safetensors"

    def _flow(self, step: int) -> Path:
        return self.folder / f"flow-{step:05d}"


def digest_of(*values: object) -> str:
    """Hex digest of tensors, containers, strings and numbers; of other objects only the type counts."""
    digest = hashlib.sha256()
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, value: object) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in value:
            _update(digest, key)
            _update(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    elif isinstance(value, str | int | float | bool | bytes | None):
        digest.update(repr(value).encode())
