"""Replacing modules of a model in place: what conversion and loading share.

Swapping is the one moment at which a model is neither the old one nor the new one, so nothing here computes or reads, and
Ctrl-C waits until it is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from torch import nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


def replace_module(model: nn.Module, names: Sequence[str], new: nn.Module) -> None:
    """Puts `new` in the place of the module of `model` that has all of `names`, with its training flag and hooks."""
    old = model.get_submodule(names[0])
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, then delivers it.

    Python delivers it to the main thread only, and leaves handlers that were not installed from Python alone; so does this.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            previous(*received[-1])
