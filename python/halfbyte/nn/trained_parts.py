"""Parts of modules, such as the layers of an LSTM, while they train with fake quantization.

A module made of parts asks here what to compute with, since it reads the weights of its parts past their forward. Parts that
do not train so are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def run_parts(run: Callable[..., tuple[Tensor, ...]], *parts: nn.Module | None) -> tuple[Tensor, ...]:
    """`run(*parts)`, with parts in evaluation mode as the quantized layers that they will become.

    Where gradients are enabled, the results have those values and the gradients of the parts themselves.
    """
    forms: list[nn.Module | None] = []
    for part in parts:
        inference_form = getattr(part, "inference_form", None)
        forms.append(part if inference_form is None else inference_form())
    if not torch.is_grad_enabled() or all(a is b for a, b in zip(forms, parts, strict=True)):
        return run(*forms)
    with torch.no_grad():
        values = run(*forms)
    return tuple(with_value(result, value) for result, value in zip(run(*parts), values, strict=True))


def for_steps(part: nn.Module) -> Callable[[Tensor], Tensor]:
    """The part for the steps of one sequence: a weight that trains is fake-quantized once for all of them."""
    of_part = getattr(part, "for_steps", None)
    return part if of_part is None else of_part()


def training_weight(part: nn.Module) -> Tensor:
    """The weight of a float layer, fake-quantized if it trains so."""
    quantized_weight = getattr(part, "quantized_weight", None)
    weight = part.weight if quantized_weight is None else quantized_weight()
    assert isinstance(weight, Tensor)
    return weight


def with_value(gradient_of: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient_of`: of one tensor computed in two ways, the exact and the differentiable one."""
    y: Tensor = _WithValue.apply(gradient_of, value)  # type: ignore[no-untyped-call]
    return y


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, gradient_of: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
