"""Booleans that a checkpoint keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Switches(nn.Module):
    """Named booleans in one buffer, `switches`, so that a `state_dict` holds them.

    Forward reads a Python copy: a compiled graph is specialised on it and need not look at data.
    """

    switches: Tensor

    def __init__(self, **values: bool) -> None:
        super().__init__()
        self.add_switches(**values)

    def add_switches(self, **values: bool) -> None:
        """Makes the buffer; for classes whose constructor does not run this one's."""
        self._on = values
        self.register_buffer("switches", torch.tensor(list(values.values()), dtype=torch.uint8))

    def on(self, name: str) -> bool:
        """Whether the switch is on."""
        return self._on[name]

    def switch(self, name: str, value: bool) -> None:
        """Turns a switch on or off."""
        assert name in self._on
        self._on = {**self._on, name: value}  # a new dictionary: a copy of the module shares the old one
        self.switches.copy_(torch.tensor(list(self._on.values()), dtype=torch.uint8))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._on = {name: bool(value) for name, value in zip(self._on, self.switches.tolist(), strict=True)}
