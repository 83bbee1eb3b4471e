"""Replacing modules of a model in place: what conversion and loading share.

Swapping is the one moment at which a model is neither the old one nor the new one, so nothing here computes or reads, and
Ctrl-C waits until it is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from torch import nn

from halfbyte.parametrized import without_norm_hooks
from halfbyte.parts import ModelInParts, keep_type_before
from halfbyte.targets import disable_fast_paths, is_converted

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


def replace_module(model: nn.Module, names: Sequence[str], new: nn.Module) -> None:
    """Puts `new` in the place of the module of `model` that has all of `names`, with its training flag and hooks."""
    old = model.get_submodule(names[0])
    new.train(old.training)
    keep_type_before(old, new)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new._forward_pre_hooks = without_norm_hooks(old)  # type: ignore[assignment]
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new


def put_parts_in_place(model: nn.Module, names: Collection[str]) -> Callable[[], None]:
    """Replaces the modules `names` by their float parts; what it returns undoes that."""
    view = ModelInParts.of(model, names)
    # Only these may stay alive until the undo goes: it must not keep the float weights of modules that are swapped meanwhile.
    wholes = [((name, *view.aliases[name]), whole) for name, whole in view.wholes.items()]
    with interrupts_deferred():
        for all_names, _ in wholes:
            replace_module(model, all_names, view.modules[all_names[0]])
        enable_fast_paths = disable_fast_paths(model)

    def undo() -> None:
        with interrupts_deferred():
            for all_names, whole in wholes:
                hooks = whole._forward_pre_hooks
                replace_module(model, all_names, whole)
                whole._forward_pre_hooks = hooks
            enable_fast_paths()

    return undo


@contextmanager
def in_parts(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """The same for a block that quantizes the parts. If it fails before it swapped them in, the modules are put back."""
    undo = put_parts_in_place(model, names)
    try:
        yield
    except BaseException:
        if not any(is_converted(module) for module in model.modules()):
            undo()
        raise


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
