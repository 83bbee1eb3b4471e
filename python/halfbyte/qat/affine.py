"""Fake quantization with a scale and a zero point that are given, not trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfbyte import ops
from halfbyte.qat.functions import Gradients, Pullback


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """`ops.fake_quantize`; the gradient passes where a value is inside the range.

    Args:
        scale, zero_point, qmin, qmax, group_size: As for `ops.fake_quantize`.
        per_sample: One scale for each index of the first dimension, all other elements of it sharing that.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    group_size: int | None = None
    per_sample: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Scale and zero point."""
        return self.scale, self.zero_point

    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size, self.per_sample)
        dense = memory.view(x.detach())
        y = ops.fake_quantize(dense, *tensors, qmin=self.qmin, qmax=self.qmax, group_size=memory.group_size)
        return memory.restore(y)

    def vjp(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Pullback]:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size, self.per_sample)
        dense = memory.view(x.detach())
        y, mask = ops.fake_quantize_mask(dense, *tensors, qmin=self.qmin, qmax=self.qmax, group_size=memory.group_size)

        def pullback(grad: Tensor) -> Gradients:
            return memory.restore(ops.straight_through(memory.view(grad), mask)), None, None

        return memory.restore(y), pullback

    def __call__(self, x: Tensor) -> Tensor:
        """See `FakeQuantize`."""
        memory = MemoryOrder(x, self.group_size, self.per_sample)
        qmin, qmax = self.qmin, self.qmax
        y = ops.fake_quantize(
            memory.view(x), self.scale, self.zero_point, qmin=qmin, qmax=qmax, group_size=memory.group_size
        )
        return memory.restore(y)


class MemoryOrder:
    """Views of tensors like `x` with their elements in the order in which they lie in memory, so that nothing is copied.

    Where one scale is for all of them, or for a sample, the order within does not matter: `channels_last` stays what it is.
    """

    def __init__(self, x: Tensor, group_size: int | None, per_sample: bool = False) -> None:
        order = tuple(range(x.dim()))
        if group_size is None and not x.is_contiguous():
            order = tuple(sorted(order, key=lambda d: -x.stride()[d]))
            if not x.permute(order).is_contiguous() or (per_sample and order[0] != 0):
                order = tuple(range(x.dim()))
        self._order, self._shape = order, [x.shape[d] for d in order]
        self._per_sample = per_sample
        self.group_size = x.flatten(1).shape[1] if per_sample else group_size

    def view(self, x: Tensor) -> Tensor:
        x = x.permute(self._order)
        return x.flatten(1) if self._per_sample else x

    def restore(self, dense: Tensor) -> Tensor:
        return dense.reshape(self._shape).permute([self._order.index(d) for d in range(len(self._order))])
