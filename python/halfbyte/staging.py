"""Tensors that wait: in memory up to a budget, past it in a temporary file.

A conversion must not change the model before every layer succeeded, must be able to undo what its transforms changed, and
must not hold all of that beside all float weights. The file has no name and goes with the process.
"""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.ops import Layout


class TensorStore:
    """Keeps tensors by key until it is closed.

    Args:
        memory_budget: Bytes that may stay in memory.
    """

    def __init__(self, memory_budget: int) -> None:
        self._budget = memory_budget
        self._held: dict[str, Tensor] = {}
        self._spilled: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def close(self) -> None:
        """Forgets everything."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor, not a copy of it unless it is spilled.

        Raises:
            OSError: the temporary file cannot be written (disk full).
        """
        if tensor.nbytes <= self._budget:
            self._budget -= tensor.nbytes
            self._held[key] = tensor
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="halfbyte-")  # noqa: SIM115, closed by close
        if self._file.tell() != self._end:  # after a read
            self._file.seek(self._end)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        self._spilled[key] = (self._end, tensor.shape, tensor.dtype)
        self._end += tensor.nbytes

    def get(self, key: str) -> Tensor:
        """The tensor stored under `key`; one that was spilled is read anew."""
        if key in self._held:
            return self._held[key]
        offset, size, dtype = self._spilled[key]
        assert self._file is not None
        tensor = ops.empty_packed(size, dtype)
        self._file.seek(offset)
        read = bytearray(self._file.read(tensor.nbytes))
        tensor.view(torch.uint8).copy_(torch.frombuffer(read, dtype=torch.uint8).view(tensor.view(torch.uint8).shape))
        return tensor


class Staging:
    """Keeps packed weights by key; a context manager, which closes the file.

    Args:
        memory_budget: Bytes that may stay in memory.
    """

    def __init__(self, memory_budget: int) -> None:
        self._store = TensorStore(memory_budget)
        self._weights: dict[str, tuple[tuple[str, ...], Layout, tuple[int, int]]] = {}

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._store.close()

    def put(self, key: str, weight: PackedWeight) -> None:
        """Stores a weight.

        Raises:
            OSError: the temporary file cannot be written (disk full); nothing was changed yet.
        """
        tensors = {name: tensor for name, tensor in weight.tensors().items() if tensor is not None}
        for name, tensor in tensors.items():
            self._store.put(f"{key}.{name}", tensor)
        self._weights[key] = (tuple(tensors), weight.layout, weight.shape)

    def get(self, key: str) -> PackedWeight:
        """The weight stored under `key`."""
        names, layout, shape = self._weights[key]
        tensors = {name: self._store.get(f"{key}.{name}") for name in names}
        qweight, scale = tensors["qweight"], tensors["scale"]
        return PackedWeight(qweight, scale, tensors.get("zero_point"), layout, shape, tensors.get("codebook"))
