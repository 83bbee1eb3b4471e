"""Gradients of operators, and calls past the dispatcher's Python autograd kernels, which take many times longer a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

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


def refuse_gradient(operator: str, why: str) -> None:
    """Makes differentiating `halfbyte::{operator}` raise `why`."""

    def nothing_saved(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
        pass

    def refuse(ctx: FunctionCtx, *grads: Tensor | None) -> None:
        raise NotImplementedError(why)

    torch.library.register_autograd(f"halfbyte::{operator}", refuse, setup_context=nothing_saved)


def refuse_second_derivative(operator: str) -> None:
    """The same for `halfbyte::{operator}_backward`, a straight-through estimator."""

    def refuse(ctx: FunctionCtx, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"{operator} has no second derivative: its gradient is the straight-through estimator; "
            "do not differentiate through a backward pass (create_graph=True) that contains it"
        )

    torch.library.register_autograd(f"halfbyte::{operator}_backward", refuse)


def with_gradients(operator: str, *, saved: int) -> Callable[..., Tensor]:
    """Gives `halfbyte::{operator}` the gradients of `halfbyte::{operator}_backward(grad, *arguments)`.

    Args:
        operator: Both take the same arguments; the second returns the gradients of the first few.
        saved: How many leading arguments are tensors. They are all that is kept for the backward pass.

    Returns:
        What calls the operator.
    """
    forward = getattr(torch.ops.halfbyte, operator).default
    backward = getattr(torch.ops.halfbyte, f"{operator}_backward").default

    def save(ctx: FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:saved])  # type: ignore[arg-type]  # inputs are typed as objects
        ctx.options = inputs[saved:]  # type: ignore[attr-defined]  # a context takes any attribute

    def gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
        options: tuple[object, ...] = ctx.options  # type: ignore[attr-defined]
        found: tuple[Tensor, ...] = backward(grad, *tensors, *options)
        return found + (None,) * (saved + len(options) - len(found))

    torch.library.register_autograd(f"halfbyte::{operator}", gradients, setup_context=save)
    refuse_second_derivative(operator)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, *arguments: object) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                y: Tensor = forward(*arguments)
            save(ctx, arguments, y)
            return y

        @staticmethod
        def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True: the operator's own autograd refuses a second derivative
                return gradients(ctx, grad)
            with torch._C._AutoDispatchBelowAutograd():
                return gradients(ctx, grad)

    def call(*arguments: object) -> Tensor:
        trains = False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for tensor in arguments[:saved]:
                trains = trains or tensor.requires_grad  # type: ignore[attr-defined]  # the leading arguments are tensors
        y: Tensor = (Eager.apply if trains else forward)(*arguments)
        return y

    return call
