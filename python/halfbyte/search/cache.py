"""A file of measurements: a second search over the same model, data and schemes measures nothing again, and one that was
interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor, nn

from halfbyte._extension import __version__
from halfbyte.errors import FileFormatError
from halfbyte.search.losses import Measurement

_FORMAT = "halfbyte sensitivity cache 1"


class MeasurementCache:
    """Measurements by the content of what was measured; each is written at once.

    Args:
        path: A file of JSON lines, made if absent; None keeps nothing.
        subject: What all measurements have in common: `content_hash` of model, data, schemes and loss.

    Raises:
        FileFormatError: the file is something else.
    """

    def __init__(self, path: str | Path | None, subject: str) -> None:
        self._path, self._subject = None if path is None else Path(path), subject
        self._known: dict[str, Measurement] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def get(self, choices: Mapping[str, str], start: str) -> Measurement | None:
        """The measurement of a configuration against `start`, if it is there."""
        return self._known.get(self._key(choices, start))

    def put(self, choices: Mapping[str, str], start: str, measurement: Measurement) -> None:
        """Keeps a measurement."""
        key = self._key(choices, start)
        self._known[key] = measurement
        if self._path is not None:
            new = not self._path.exists()
            line = {"key": key, "loss": measurement.loss, "margin": measurement.margin}
            with self._path.open("a", encoding="utf-8") as file:
                file.write((json.dumps({"format": _FORMAT}) + "\n" if new else "") + json.dumps(line) + "\n")

    def _key(self, choices: Mapping[str, str], start: str) -> str:
        text = json.dumps([self._subject, start, sorted(choices.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            header = json.loads(lines[0]) if lines else {}
        except json.JSONDecodeError:
            header = {}
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise FileFormatError(f"{path} is not a cache of sensitivities; name another file or delete it")
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = Measurement(float(entry["loss"]), float(entry["margin"]))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                continue  # the line that an interrupt cut short


def content_hash(model: nn.Module, batches: Sequence[object], settings: Mapping[str, object]) -> str:
    """SHA-256 over the bytes of a model's tensors, of the data, and over the settings."""
    digest = hashlib.sha256(f"halfbyte {__version__}, torch {torch.__version__}".encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            _update(digest, tensor)
    for part in _walk(batches):
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            _update(digest, part)
        else:
            digest.update(pickle.dumps(part))
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def describe_callable(function: Callable[..., object]) -> list[str]:
    """Name and code of a function or callable object, for `content_hash`. What it refers to is not part of it."""
    named = function if hasattr(function, "__qualname__") else type(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    parts = [f"{named.__module__}.{named.__qualname__}"]
    if isinstance(function, partial):
        parts += describe_callable(function.func)
    if isinstance(code, CodeType):
        parts += _describe_code(code)
    return parts


def _describe_code(code: CodeType) -> list[str]:
    inner = [_describe_code(c) if isinstance(c, CodeType) else [repr(c)] for c in code.co_consts]
    return [code.co_code.hex(), *code.co_names, *(text for texts in inner for text in texts)]


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _walk(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        for key in value:
            yield str(key)
            yield from _walk(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _walk(each)
    else:
        yield value
