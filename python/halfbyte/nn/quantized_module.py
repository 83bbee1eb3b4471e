"""What quantized modules share: their packed weight as plain buffers, and buffers that survive `model.to(dtype)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from halfbyte.formats import IntFormat
from halfbyte.nn.packed_weight import Layout, PackedWeight, packed_shapes
from halfbyte.schemes import Scheme


class QuantizedModule(nn.Module):
    """Base of modules with integer weights.

    Buffers `qweight`, `scale` and, for asymmetric formats, `zero_point` are plain tensors, so `state_dict`, `deepcopy`,
    pickle, `torch.compile` and `torch.export` need nothing special. Casting the model (`model.half()`) changes the dtype of
    activations and biases, never that of the scales: integers without their exact scales are another model.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, scheme: Scheme, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        if not isinstance(scheme.weight, IntFormat):
            raise TypeError(f"{type(self).__name__} needs integer weights, not {scheme.weight}")
        self.scheme = scheme
        self.layout: Layout = weight.layout
        self.dtype = dtype
        self._weight_shape = weight.shape
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def weight_format(self) -> IntFormat:
        """Format of the weights."""
        weight_format = self.scheme.weight
        assert isinstance(weight_format, IntFormat)
        return weight_format

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; all of them per channel."""
        return self.weight_format.group_size(self._weight_shape[1])

    @property
    def packed_weight(self) -> PackedWeight:
        """The buffers with their layout and shape."""
        return PackedWeight(self.qweight, self.scale, self.zero_point, self.layout, self._weight_shape)

    def dequantize(self) -> Tensor:
        """The weight `[O, I]` in float32: exactly the numbers that the kernels multiply with."""
        return self.packed_weight.dequantize(self.weight_format)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the module's float dtype, computed at each access; assigning to it is an error.

        It is there for code that reads `module.weight` past `forward`; what it reads is right, but not fast.
        """
        return self.dequantize().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            if new.device == old.device and new.dtype != old.dtype:
                self._buffers[name] = old
            elif new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if not self.dtype.is_floating_point:
            return self
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return self


def expected_tensors(
    scheme: Scheme, layout: Layout, shape: tuple[int, int]
) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the buffers of a quantized module."""
    assert isinstance(scheme.weight, IntFormat)
    return packed_shapes(scheme.weight, layout, shape)
