"""Convolutions with quantized weights: integer or 16-bit floating point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.convolution import ConvGeometry
from halfbyte.formats import FloatFormat
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.nn.quantized_module import QuantizedModule
from halfbyte.schemes import Scheme


class QuantizedConv(QuantizedModule):
    """A convolution with weights in 1 to 8 bits, and activations in floating point or INT8.

    The base of `QuantizedConv1d`, `QuantizedConvTranspose2d` and their kin, which differ in `geometry` only. INT8 activations
    are quantized with `act_scale` and `act_zero_point` where they are given, else each sample with its own `absmax / 127`;
    padding with zeros is exact. Other padding modes pad before quantizing.

    Args:
        scheme: Weight and activation formats.
        weight: Packed matrix `[O, taps * C/groups]` in the tiles layout (`ConvGeometry.weight_matrix`).
        bias: `[O]`, floating point, or None. Kept as the parameter it is.
        geometry: Channels, kernel, stride, padding and the rest.
        dtype: dtype that `weight` reads as; outputs have the dtype of the input.
        activation: `act_scale` and `act_zero_point` of a scheme with static activations, as in `QuantizedLinear`.

    Shapes:
        input `[N, C, ...]` or `[C, ...]`, output `[N, O, ...]` or `[O, ...]`; float32, bfloat16 or float16. Channels last in
        memory if the input is, and fastest so.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1))
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> model[0](torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: Scheme,
        weight: PackedWeight,
        bias: nn.Parameter | None,
        geometry: ConvGeometry,
        dtype: torch.dtype = torch.float32,
        activation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(scheme, weight, dtype, activation)
        if scheme.static != (activation is not None):
            raise ValueError(f"{scheme}: {'give' if scheme.static else 'do not give'} the qparams of activations")
        if weight.shape != geometry.shape:
            raise ValueError(f"the weight has shape {weight.shape}; {geometry} needs {geometry.shape}")
        self.geometry = geometry
        self.in_channels, self.out_channels = geometry.in_channels, geometry.out_channels
        self.kernel_size, self.stride, self.groups = geometry.kernel_size, geometry.stride, geometry.groups
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`[N, C, ...]` to `[N, O, ...]`; `output_size` is that of `nn.ConvTranspose2d`."""
        return _in_batch(self.geometry, x, output_size, self._convolve)

    def _convolve(self, x: Tensor, geometry: ConvGeometry) -> Tensor:
        if geometry.padding_mode != "zeros":
            x, geometry = geometry.padded(x)
        shared: dict[str, Any] = {
            "out_channels": geometry.out_channels,
            "kernel_size": geometry.kernel_size,
            "stride": geometry.stride,
            "padding": geometry.padding,
            "dilation": geometry.dilation,
            "groups": geometry.groups,
            "transposed": geometry.transposed,
            "output_padding": geometry.output_padding,
            "bits": self.bits,
            "group_size": self.group_size,
        }
        weight = (self.qweight, self.scale, self.zero_point, self.bias)
        if self.scheme.activation is None:
            return ops.conv_weight_only(x, *weight, **shared, codebook=self.codebook)
        return ops.conv_int8(
            self.clipped_input(x), *weight, **shared, act_scale=self.act_scale, act_zero_point=self.act_zero_point
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight as torch's module has it, computed at each access."""
        return self.geometry.weight_of(self.dequantize()).to(self.dtype)

    def extra_repr(self) -> str:
        """Sizes and formats, for `print(model)`."""
        return f"{self.geometry.description()}, bias={self.bias is not None}, {self.scheme}"


class QuantizedConv1d(QuantizedConv):
    """`nn.Conv1d`; see `QuantizedConv`."""


class QuantizedConv2d(QuantizedConv):
    """`nn.Conv2d`; see `QuantizedConv`."""


class QuantizedConv3d(QuantizedConv):
    """`nn.Conv3d`; see `QuantizedConv`."""


class QuantizedConvTranspose1d(QuantizedConv):
    """`nn.ConvTranspose1d`; see `QuantizedConv`."""


class QuantizedConvTranspose2d(QuantizedConv):
    """`nn.ConvTranspose2d`; see `QuantizedConv`."""


class QuantizedConvTranspose3d(QuantizedConv):
    """`nn.ConvTranspose3d`; see `QuantizedConv`."""


_QUANTIZED = {
    (1, False): QuantizedConv1d,
    (2, False): QuantizedConv2d,
    (3, False): QuantizedConv3d,
    (1, True): QuantizedConvTranspose1d,
    (2, True): QuantizedConvTranspose2d,
    (3, True): QuantizedConvTranspose3d,
}


def quantized_conv_type(geometry: ConvGeometry) -> type[QuantizedConv]:
    """The class of a quantized convolution."""
    return _QUANTIZED[geometry.dims, geometry.transposed]


class HalfConv(nn.Module):
    """A convolution whose weights and products are bfloat16 or float16; inputs and outputs keep their dtype.

    Args:
        scheme: `hb.bf16()` or `hb.fp16()`.
        weight: Weight of torch's module, in the scheme's dtype.
        bias: `[O]` or None; added in the scheme's dtype.
        geometry: Channels, kernel, stride, padding and the rest.
    """

    bias: nn.Parameter | None

    def __init__(self, scheme: Scheme, weight: nn.Parameter, bias: nn.Parameter | None, geometry: ConvGeometry) -> None:
        super().__init__()
        if not isinstance(scheme.weight, FloatFormat):
            raise TypeError(f"HalfConv needs 16-bit floats, not {scheme.weight}")
        self.scheme = scheme
        self.geometry = geometry
        self.in_channels, self.out_channels = geometry.in_channels, geometry.out_channels
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`[N, C, ...]` to `[N, O, ...]`; `output_size` is that of `nn.ConvTranspose2d`."""
        return _in_batch(self.geometry, x, output_size, self._convolve)

    def _convolve(self, x: Tensor, geometry: ConvGeometry) -> Tensor:
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return geometry.convolve(x.to(dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"{self.geometry.description()}, bias={self.bias is not None}, {self.scheme}"


def _in_batch(
    geometry: ConvGeometry,
    x: Tensor,
    output_size: Sequence[int] | None,
    convolve: Callable[[Tensor, ConvGeometry], Tensor],
) -> Tensor:
    """Runs `convolve` on `[N, C, ...]`, also for an input without `N`."""
    dims = geometry.dims
    if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != geometry.in_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it needs [N, C, ...] with C={geometry.in_channels} and {dims} spatial dimensions"
        )
    batch = x if x.dim() == dims + 2 else x.unsqueeze(0)
    if output_size is not None:
        geometry = geometry.with_output_size(batch.shape[2:], output_size)
    y = convolve(batch, geometry)
    return y if x.dim() == dims + 2 else y.squeeze(0)
