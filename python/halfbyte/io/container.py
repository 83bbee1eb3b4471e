"""Reading and writing safetensors files: atomically, and one tensor at a time.

The safetensors library writes, and checks headers; data is read with plain reads into tensors of our own. Its mapped views
would tie a model to a file that may be overwritten under it, and are not aligned for the kernels.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from halfbyte import ops
from halfbyte.errors import FileFormatError
from halfbyte.io.manifest import dtype_name
from halfbyte.io.tensors import raw_bytes

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file as a whole or not at all: whatever stands at `path` stays until the new file is complete on disk.

    Args:
        path: Where; its folder must exist.
        tensors: Contiguous CPU tensors.
        metadata: For the header; one entry, or the order of the bytes is not fixed.

    Raises:
        OSError: the file cannot be written; no trace of it is left.
    """
    specs = {
        name: TensorSpec(
            dtype=dtype_name(t.dtype), shape=list(t.shape), data_ptr=t.data_ptr() or _ANY_ADDRESS, data_len=t.nbytes
        )
        for name, t in tensors.items()
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        try:
            serialize_file(specs, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        temporary.chmod(mode)  # the library makes files that only their owner may read
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must outlive a power cut
    finally:
        os.close(folder)


_ANY_ADDRESS = 1  # an empty tensor has none; no byte of it is read


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class Reader:
    """An open file; a context manager.

    Args:
        path: The file.

    Attributes:
        metadata: The header's metadata.
        tensors: What it stores, by name.

    Raises:
        FileFormatError: not a complete safetensors file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("rb", buffering=0)
        try:
            self.metadata, self.tensors = _read_header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own.

        Raises:
            FileFormatError: the file ends before it does.
        """
        stored = self.tensors[name]
        tensor = ops.empty_packed(stored.shape, stored.dtype)
        self._file.seek(stored.begin)
        memory = raw_bytes(tensor)
        done = 0
        while done < len(memory):
            count = self._file.readinto(memory[done:])  # type: ignore[attr-defined]
            if not count:
                raise FileFormatError(f"the file ends inside tensor {name!r}: it is truncated; get it again")
            done += count
        return tensor


def _read_header(file: IO[bytes], path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(9)
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 9 or prefix[8:] != b"{" or length > 100_000_000:  # the library's own limit
        raise FileFormatError("it is not a safetensors file; give the path that hb.save wrote")
    if 8 + length > size:
        raise FileFormatError(f"it is truncated: {size} bytes, and its header alone takes {8 + length}; get it again")
    try:
        with safe_open(path, framework="pt") as checked:
            metadata = dict(checked.metadata() or {})
    except SafetensorError as error:
        raise FileFormatError(f"it is truncated or damaged ({error}); get it again") from error
    file.seek(8)
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, fields in header.items():
        dtype = _DTYPES.get(fields["dtype"])
        if dtype is None:
            raise FileFormatError(f"tensor {name!r} has dtype {fields['dtype']}, which halfbyte does not write")
        tensors[name] = StoredTensor(dtype, tuple(fields["shape"]), 8 + length + fields["data_offsets"][0])
    return metadata, tensors
