"""Products of fake-quantized operands that keep no quantized copy for backward.

Autograd would save the fake-quantized input and weight beside the originals. `fake_quantized_product` saves the originals,
which are alive anyway, and computes the quantized ones again in backward, where their gradient masks come from as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from halfbyte.convolution import ConvGeometry
from halfbyte.nn.trained_parts import with_value

Gradients: TypeAlias = tuple[Tensor | None, ...]
Pullback: TypeAlias = Callable[[Tensor], Gradients]


class FakeQuantize(Protocol):
    """One application of fake quantization: what it does to a tensor, and the gradient that this gets."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it depends on beside its argument; may require gradients."""
        ...

    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The value, without a gradient. `tensors` has the values of the property."""
        ...

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """The value, and a function from its gradient to those of `x` and of each of `tensors`, None where there is none."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The value, differentiable by autograd; for graphs that a compiler sees."""
        ...


class Product(Protocol):
    """An operator with a weight: linear, or a convolution."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        ...

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """Gradients of `x`, `weight` and the bias, where `needs` asks for them."""
        ...


@dataclass(frozen=True, slots=True)
class LinearProduct:
    """`F.linear`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        return F.linear(x, weight, bias)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """Three matrix products at most."""
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if needs[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )


@dataclass(frozen=True, slots=True)
class ConvProduct:
    """A convolution of an input that is padded as `ConvGeometry.padded` leaves it."""

    geometry: ConvGeometry

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[N, C, ...]` to `[N, O, ...]`."""
        return self.geometry.convolve(x, weight, bias)

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """As torch's own convolution computes them."""
        g = self.geometry
        gradients: Gradients = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [g.out_channels],
            g.stride,
            g.padding_before,
            g.dilation,
            g.transposed,
            g.output_padding,
            g.groups,
            list(needs),
        )
        return gradients


def fake_quantized_product(
    product: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_fake: FakeQuantize | None,
    weight_fake: FakeQuantize | None,
) -> Tensor:
    """`product(input_fake(x), weight_fake(weight), bias)`, differentiable; None leaves an operand as it is."""
    of_input = () if input_fake is None else input_fake.tensors
    of_weight = () if weight_fake is None else weight_fake.tensors
    trained = [t for t in (x, weight, bias, *of_input, *of_weight) if t is not None and t.requires_grad]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not trained:
        x = x if input_fake is None else input_fake(x)
        return product.forward(x, weight if weight_fake is None else weight_fake(weight), bias)
    y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        product, input_fake, weight_fake, len(of_input), x, weight, bias, *of_input, *of_weight
    )
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        product: Product,
        input_fake: FakeQuantize | None,
        weight_fake: FakeQuantize | None,
        count: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.plan = (product, input_fake, weight_fake, count)  # type: ignore[attr-defined]  # a context takes any attribute
        ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]
        x_hat = x if input_fake is None else input_fake.quantize(x, *tensors[:count])
        w_hat = weight if weight_fake is None else weight_fake.quantize(weight, *tensors[count:])
        return product.forward(x_hat, w_hat, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fake-quantized layers have no second derivative: do not differentiate through a backward pass "
                "(create_graph=True) that contains them"
            )
        x, weight, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub of FunctionCtx lacks it
        product, input_fake, weight_fake, count = ctx.plan  # type: ignore[attr-defined]
        bias_dtype: torch.dtype | None = ctx.bias_dtype  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        w_hat, weight_back = _value(weight_fake, weight, tensors[count:], any((needs[5], *needs[7 + count :])))
        needs_input = any((needs[4], *needs[7 : 7 + count]))
        needs_weight = any((needs[5], *needs[7 + count :]))
        x_hat, input_back = _value(input_fake, x, tensors[:count], needs_input)
        dx, dw, db = product.gradients(
            grad, x_hat.to(grad.dtype), w_hat.to(grad.dtype), (needs_input, needs_weight, needs[6])
        )
        del x_hat, w_hat
        of_input = _pulled(input_back, dx, x.dtype, count)
        of_weight = _pulled(weight_back, dw, weight.dtype, len(tensors) - count)
        db = None if db is None else db.to(bias_dtype)
        return (None, None, None, None, of_input[0], of_weight[0], db, *of_input[1:], *of_weight[1:])


def _value(
    fake: FakeQuantize | None, x: Tensor, tensors: Sequence[Tensor], needed: bool
) -> tuple[Tensor, Pullback | None]:
    if fake is None:
        return x, None
    return fake.vjp(x, *tensors) if needed else (fake.quantize(x, *tensors), None)


def _pulled(back: Pullback | None, grad: Tensor | None, dtype: torch.dtype, count: int) -> Gradients:
    if grad is None:
        return (None,) * (1 + count)
    grad = grad.to(dtype)
    return (grad,) if back is None else back(grad)


class StraightThrough:
    """Any rounding, with the gradient passed straight through everywhere.

    Args:
        rounded: The rounding.
    """

    tensors: tuple[Tensor, ...] = ()

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        self._rounded = rounded

    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        return self._rounded(x.detach())

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """See `FakeQuantize`."""

        def pullback(grad: Tensor) -> Gradients:
            return (grad,)

        return self._rounded(x.detach()), pullback

    def __call__(self, x: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        return with_value(x, self._rounded(x.detach()))
