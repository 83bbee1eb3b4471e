"""Changes of float weights that can be taken back: what transforms do to a model before its weights are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfbyte.staging import TensorStore
from halfbyte.swap import interrupts_deferred
from halfbyte.targets import is_converted


class WeightEdits:
    """Writes new values into parameters and keeps the old ones.

    Args:
        memory_budget: Bytes of old values that may stay in memory; the others wait in a temporary file.
    """

    def __init__(self, memory_budget: int) -> None:
        self._parameters: dict[int, nn.Parameter] = {}
        self._store = TensorStore(memory_budget)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter to `value`, converted to its dtype; its first value is kept.

        Raises:
            OSError: the old value cannot be kept (disk full); the parameter is as it was.
        """
        key = id(parameter)
        if key not in self._parameters:
            self._store.put(str(key), parameter.detach().clone())
            self._parameters[key] = parameter
        with torch.no_grad():
            parameter.copy_(value)

    def undo(self) -> None:
        """Gives every parameter its first value back."""
        with torch.no_grad(), interrupts_deferred():
            for key, parameter in self._parameters.items():
                parameter.copy_(self._store.get(str(key)))

    def close(self) -> None:
        """Forgets the old values."""
        self._parameters.clear()
        self._store.close()


@contextmanager
def undone_on_failure(model: nn.Module, memory_budget: int) -> Iterator[WeightEdits]:
    """Edits that are taken back if the block fails before it put quantized modules into the model."""
    edits = WeightEdits(memory_budget)
    try:
        yield edits
    except BaseException:
        if not any(is_converted(module) for module in model.modules()):
            edits.undo()
        raise
    finally:
        edits.close()
