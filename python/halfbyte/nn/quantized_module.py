"""What quantized modules share: their packed weight as plain buffers, and buffers that survive `model.to(dtype)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfbyte.formats import CodebookFormat, IntFormat, PackedFormat
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.ops import Layout
from halfbyte.schemes import Scheme

ACTIVATION_BUFFERS = {
    "act_scale": torch.float32,
    "act_zero_point": torch.int32,
}  # of static activations, one number each


class QuantizedModule(nn.Module):
    """Base of modules with weights in packed codes.

    Buffers `qweight`, `scale`, for asymmetric formats `zero_point`, for codebooks `codebook` and for static activations
    `act_scale` and `act_zero_point` are plain tensors, so `state_dict`, `deepcopy`, pickle, `torch.compile` and
    `torch.export` need nothing special. Casting the model (`model.half()`) changes the dtype of activations and biases,
    never that of the scales: integers without their exact scales are another model.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codebook: Tensor | None

    act_scale: Tensor | None
    act_zero_point: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        weight: PackedWeight,
        dtype: torch.dtype,
        activation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheme.weight, IntFormat | CodebookFormat):
            raise TypeError(f"{type(self).__name__} needs integer or codebook weights, not {scheme.weight}")
        self.scheme = scheme
        self.layout: Layout = weight.layout
        self.dtype = dtype
        self._weight_shape = weight.shape
        self.bits = scheme.weight.bits
        self.group_size = scheme.weight.group_size(
            weight.shape[1]
        )  # inputs that share a scale; all of them per channel
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        for name, number in zip(ACTIVATION_BUFFERS, (None, None) if activation is None else activation, strict=True):
            self.register_buffer(name, number)

    @property
    def weight_format(self) -> PackedFormat:
        """Format of the weights."""
        weight_format = self.scheme.weight
        assert isinstance(weight_format, IntFormat | CodebookFormat)
        return weight_format

    @property
    def packed_weight(self) -> PackedWeight:
        """The buffers with their layout and shape."""
        return PackedWeight(self.qweight, self.scale, self.zero_point, self.layout, self._weight_shape, self.codebook)

    def clipped_input(self, x: Tensor) -> Tensor:
        """Inputs within the range of activation codes, where those have fewer than the 8 bits to which kernels clip."""
        activation = self.scheme.activation
        if activation is None or activation.bits == 8 or self.act_scale is None or self.act_zero_point is None:
            return x
        # The ends of the range have the outermost codes exactly, and rounding is monotonic: no other code changes.
        half = 1 << (activation.bits - 1)
        low, high = ((end - self.act_zero_point) * self.act_scale for end in (-half, half - 1))
        return torch.clamp(x, low.to(x.dtype), high.to(x.dtype))

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
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old if new.device == old.device else old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return self
