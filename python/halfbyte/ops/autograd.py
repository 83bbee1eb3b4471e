"""Calls of operators that need no gradient, without the detour through Python that looks whether they do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def skipped_autograd(*tensors: Tensor | None) -> AbstractContextManager[object]:
    """A context for one operator call on `tensors`: below autograd where none of them wants a gradient.

    Operators whose gradient is written in Python are otherwise entered through Python at each call, 5 us.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return _NOTHING
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _NOTHING
    guard: AbstractContextManager[object] = torch._C._AutoDispatchBelowAutograd()
    return guard
