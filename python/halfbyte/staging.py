"""Tensors that wait: in memory up to a budget, past it in a temporary file.

A conversion must not change the model before every layer succeeded, must be able to undo what its transforms changed, and
must not hold all of that beside all float weights. The file has no name and goes with the process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Protocol

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.ops import Layout


class TensorStore:
    """Keeps tensors by key until it is closed.

    Args:
        memory_budget: Bytes that may stay in memory; None for all.
    """

    def __init__(self, memory_budget: int | None) -> None:
        self._budget = math.inf if memory_budget is None else memory_budget
        self._held: dict[str, Tensor] = {}
        self._spilled: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forgets everything."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: str, tensor: Tensor) -> None:
        """Stores a tensor, not a copy of it unless it is spilled; one that was there under `key` goes.

        Raises:
            OSError: the temporary file cannot be written (disk full).
        """
        if key in self._held:
            self._budget += self._held.pop(key).nbytes
        if tensor.nbytes <= self._budget:
            self._budget -= tensor.nbytes
            self._held[key] = tensor
            self._spilled.pop(key, None)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="halfbyte-")  # noqa: SIM115, closed by close
        before = self._spilled.get(key)
        begin = self._end if before is None or before[1].numel() * before[2].itemsize != tensor.nbytes else before[0]
        try:
            self._file.seek(begin)
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep {tensor.nbytes} bytes in {tempfile.gettempdir()}: {error.strerror}; "
                "free some space there, set TMPDIR to another folder, or allow more memory",
            ) from error
        self._spilled[key] = (begin, tensor.shape, tensor.dtype)
        self._end = max(self._end, begin + tensor.nbytes)

    @property
    def spilled_bytes(self) -> int:
        """Size of the temporary file."""
        return self._end

    def get(self, key: str) -> Tensor:
        """The tensor stored under `key`; one that was spilled is read anew."""
        if key in self._held:
            return self._held[key]
        offset, size, dtype = self._spilled[key]
        assert self._file is not None
        tensor = ops.empty_packed(size, dtype)
        self._file.seek(offset)
        if tensor.nbytes:
            self._file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
        return tensor


class WeightStore(Protocol):
    """Where finished weights wait."""

    def put(self, key: str, weight: PackedWeight) -> None:
        """Stores a weight."""
        ...

    def get(self, key: str) -> PackedWeight:
        """The weight stored under `key`."""
        ...


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
        return packed_weight(tensors, layout, shape)


def packed_weight(tensors: Mapping[str, Tensor], layout: Layout, shape: tuple[int, int]) -> PackedWeight:
    """The weight of which `tensors` are what `PackedWeight.tensors` gave."""
    qweight, scale = tensors["qweight"], tensors["scale"]
    return PackedWeight(qweight, scale, tensors.get("zero_point"), layout, shape, tensors.get("codebook"))
