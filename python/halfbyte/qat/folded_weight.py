"""The weight of a layer as its quantizer sees it: a matrix, with batch normalization folded in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.convolution import ConvGeometry
from halfbyte.qat.functions import FakeQuantize, Gradients, Pullback


@dataclass(frozen=True, slots=True, eq=False)
class FoldedWeight:
    """A `FakeQuantize` of a layer's weight: as a matrix, rows times `factor`, quantized, and back.

    Args:
        fake: What happens to the matrix.
        geometry: Of a convolution; None for a linear layer.
        factor: `[O]`, or None for ones.
        unfold: Divide the rows by the factor again.
    """

    fake: FakeQuantize
    geometry: ConvGeometry | None
    factor: Tensor | None = None
    unfold: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The factor, if there is one, and what `fake` depends on."""
        return self.fake.tensors if self.factor is None else (self.factor, *self.fake.tensors)

    def _split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        return (None, tensors) if self.factor is None else (tensors[0][:, None], tensors[1:])

    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        factor, rest = self._split(tensors)
        matrix = as_matrix(x.detach(), self.geometry)
        value = self.fake.quantize(matrix if factor is None else matrix * factor, *rest)
        return self._as_weight(value / factor if self.unfold and factor is not None else value)

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """See `FakeQuantize`."""
        factor, rest = self._split(tensors)
        matrix = as_matrix(x.detach(), self.geometry)
        value, back = self.fake.vjp(matrix if factor is None else matrix * factor, *rest)

        def pullback(grad: Tensor) -> Gradients:
            grad = as_matrix(grad, self.geometry)
            folded, *of_rest = back(grad / factor if self.unfold and factor is not None else grad)
            assert folded is not None
            of_factor: Gradients = ()
            if factor is not None:
                of_factor = (None,) if self.unfold else ((folded * matrix).sum(1),)
                folded = folded * factor
            like_x = self._as_weight(folded)
            if like_x.stride() != x.stride():
                like_x = torch.empty_like(x).copy_(like_x)
            return like_x, *of_factor, *of_rest

        return self._as_weight(value / factor if self.unfold and factor is not None else value), pullback

    def __call__(self, x: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        factor = None if self.factor is None else self.factor[:, None]
        matrix = as_matrix(x, self.geometry)
        value = self.fake(matrix if factor is None else matrix * factor)
        return self._as_weight(value / factor if self.unfold and factor is not None else value)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix if self.geometry is None else self.geometry.weight_of(matrix)


def as_matrix(weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """`[O, I]` of a layer's weight, differentiable."""
    return weight if geometry is None else geometry.weight_matrix(weight)
