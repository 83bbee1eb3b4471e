"""The quantized module that takes a float one's place, from its packed or 16-bit weight."""

from __future__ import annotations

from torch import Tensor, nn

from halfbyte.convolution import ConvModule
from halfbyte.nn import HalfConv, HalfEmbedding, HalfLinear, QuantizedEmbedding, QuantizedLinear
from halfbyte.nn.conv import quantized_conv_type
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.schemes import Scheme
from halfbyte.targets import conv_geometry


def quantized_module(
    old: nn.Module,
    scheme: Scheme,
    weight: PackedWeight | nn.Parameter,
    bias: nn.Parameter | None,
    activation: tuple[Tensor, Tensor] | None = None,
) -> nn.Module:
    """The quantized form of a Linear, Embedding or convolution.

    Args:
        old: The float module: its kind, sizes and settings are taken over, its numbers are not.
        scheme: What it gets.
        weight: Packed codes, or for `hb.bf16()` and `hb.fp16()` the weight in that dtype.
        bias: Of the new module.
        activation: `act_scale` and `act_zero_point` of a scheme with static activations.
    """
    assert isinstance(old, nn.Linear | nn.Embedding | ConvModule)
    if isinstance(weight, nn.Parameter):
        if isinstance(old, nn.Linear):
            return HalfLinear(scheme, weight, bias)
        if isinstance(old, nn.Embedding):
            return HalfEmbedding(scheme, weight, old.weight.dtype, old.padding_idx)
        return HalfConv(scheme, weight, bias, conv_geometry(old))
    if isinstance(old, nn.Linear):
        return QuantizedLinear(scheme, weight, bias, old.weight.dtype, activation)
    if isinstance(old, nn.Embedding):
        return QuantizedEmbedding(scheme, weight, old.weight.dtype, old.padding_idx)
    geometry = conv_geometry(old)
    return quantized_conv_type(geometry)(scheme, weight, bias, geometry, old.weight.dtype, activation)
