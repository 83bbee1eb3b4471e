"""Several processes that calibrate together, each on its own share of the data: `torchrun` with the gloo backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from halfbyte.errors import QuantizationError

T = TypeVar("T")


class Processes:
    """The default group of `torch.distributed`.

    All processes make the same calls in the same order; each gets the same answers.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "distributed=True needs torch.distributed.init_process_group(...), as torchrun sets it up"
            )
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank."""
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def add_up_(self, tensor: Tensor) -> None:
        """Replaces a tensor by the sum over the processes."""
        dist.all_reduce(tensor)

    def part(self, rows: int, multiple: int) -> slice:
        """This process's part of `rows`, all parts but the last a multiple of `multiple`."""
        each = -(-rows // (self.count * multiple)) * multiple
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block fails in one process, it fails in all: none is left waiting for another.

        Raises:
            QuantizationError: where it failed in another process; names it and repeats its message.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # any: it is raised again below
            error = caught
        messages = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise QuantizationError(f"process {rank} failed: {message}")


def together(processes: Processes | None) -> AbstractContextManager[None]:
    """A block that fails in all processes if it fails in one."""
    return nullcontext() if processes is None else processes.failing_together()
