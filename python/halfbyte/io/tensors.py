"""Every parameter and buffer of a model by name, and their bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a model that holds a tensor.

    Attributes:
        module: The module that owns it.
        name: Its name there.
        is_parameter: Parameter or buffer.
        persistent: Whether `state_dict` has it.
    """

    module: nn.Module
    name: str
    is_parameter: bool
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        """What it holds."""
        held = (self.module._parameters if self.is_parameter else self.module._buffers)[self.name]
        assert held is not None
        return held


def tensor_slots(model: nn.Module) -> dict[str, Slot]:
    """All slots that hold a tensor, by qualified name; a shared module appears under each of its names."""
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = "." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[f"{prefix}{dot}{name}"] = Slot(module, name, True, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                slots[f"{prefix}{dot}{name}"] = Slot(module, name, False, persistent)
    return slots


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def sha256(tensor: Tensor) -> str:
    """Hex digest of the bytes of a contiguous CPU tensor."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
