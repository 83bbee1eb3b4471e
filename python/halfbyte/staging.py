"""Results that wait until all of them exist: in memory up to a budget, past it in a temporary file.

A conversion must not change the model before every layer succeeded, and must not hold all quantized weights beside all
float ones. Quantized weights are a fraction of the float model, so the file stays small; it has no name and goes with the
process.
"""

from __future__ import annotations

import tempfile
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.ops import Layout


class Staging:
    """Keeps packed weights by key; a context manager, which closes the file.

    Args:
        memory_budget: Bytes that may stay in memory.
    """

    def __init__(self, memory_budget: int) -> None:
        self._budget = memory_budget
        self._held: dict[str, PackedWeight] = {}
        self._spilled: dict[
            str, tuple[dict[str, tuple[int, torch.Size, torch.dtype] | None], Layout, tuple[int, int]]
        ] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, key: str, weight: PackedWeight) -> None:
        """Stores a weight.

        Raises:
            OSError: the temporary file cannot be written (disk full); nothing was changed yet.
        """
        size = sum(t.nbytes for t in weight.tensors().values() if t is not None)
        if size <= self._budget:
            self._budget -= size
            self._held[key] = weight
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="halfbyte-")  # noqa: SIM115, closed by __exit__
        places: dict[str, tuple[int, torch.Size, torch.dtype] | None] = {}
        for name, tensor in weight.tensors().items():
            places[name] = None
            if tensor is not None:
                places[name] = (self._file.tell(), tensor.shape, tensor.dtype)
                self._file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        self._spilled[key] = (places, weight.layout, weight.shape)

    def get(self, key: str) -> PackedWeight:
        """The weight stored under `key`; one that was spilled is read anew."""
        if key in self._held:
            return self._held[key]
        places, layout, shape = self._spilled[key]
        assert self._file is not None
        tensors: dict[str, Tensor | None] = {}
        for name, place in places.items():
            tensors[name] = None
            if place is not None:
                offset, size, dtype = place
                tensor = torch.empty(size, dtype=dtype)
                self._file.seek(offset)
                read = bytearray(self._file.read(tensor.nbytes))
                tensor.view(torch.uint8).copy_(
                    torch.frombuffer(read, dtype=torch.uint8).view(tensor.view(torch.uint8).shape)
                )
                tensors[name] = tensor
        qweight, scale = tensors["qweight"], tensors["scale"]
        assert qweight is not None and scale is not None
        return PackedWeight(qweight, scale, tensors["zero_point"], layout, shape, tensors["codebook"])
