"""Linear layers with quantized weights: integer or 16-bit floating point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.formats import FloatFormat
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.nn.quantized_module import QuantizedModule
from halfbyte.schemes import Scheme


class QuantizedLinear(QuantizedModule):
    """`y = x Wᵀ + b` with W in 1 to 8 bits or from a codebook and x in floating point or INT8.

    Scales of INT8 inputs are found per token or in calibration.

    Args:
        scheme: Weight and activation formats.
        weight: Packed weight of shape `(out_features, in_features)` in the tiles layout.
        bias: `[out_features]`, floating point, or None. Kept as the parameter it is.
        dtype: dtype that `weight` reads as; outputs have the dtype of the input.
        activation: `act_scale` and `act_zero_point` of a scheme with static activations, one float32 and one int32 number. The
            zero point is that of signed codes, -128 to 127 with 8 bits: unsigned codes are 128 more, their zero point too.

    Shapes:
        input `[..., in_features]`, output `[..., out_features]`; float32, bfloat16 or float16.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> model[0](torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        scheme: Scheme,
        weight: PackedWeight,
        bias: nn.Parameter | None,
        dtype: torch.dtype = torch.float32,
        activation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(scheme, weight, dtype, activation)
        if scheme.static != (activation is not None):
            raise ValueError(f"{scheme}: {'give' if scheme.static else 'do not give'} the qparams of activations")
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        buffers = self._buffers  # attribute access would look for each name in three places
        qweight, scale = buffers["qweight"], buffers["scale"]
        assert qweight is not None and scale is not None
        if self.scheme.activation is None:
            return ops.linear_weight_only(
                x,
                qweight,
                scale,
                buffers["zero_point"],
                self._parameters["bias"],
                bits=self.bits,
                out_features=self.out_features,
                group_size=self.group_size,
                codebook=buffers["codebook"],
            )
        return ops.linear_int8(
            self.clipped_input(x),
            qweight,
            scale,
            buffers["zero_point"],
            self._parameters["bias"],
            bits=self.bits,
            out_features=self.out_features,
            group_size=self.group_size,
            act_scale=buffers["act_scale"],
            act_zero_point=buffers["act_zero_point"],
            asymmetric=self.scheme.asymmetric_rows,
        )

    def extra_repr(self) -> str:
        """Features and formats, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.scheme}"


class HalfLinear(nn.Module):
    """`nn.Linear` whose weights and products are bfloat16 or float16; inputs and outputs keep their dtype.

    Args:
        scheme: `hb.bf16()` or `hb.fp16()`.
        weight: `[out_features, in_features]` in the scheme's dtype.
        bias: `[out_features]` or None; added in the scheme's dtype.
    """

    bias: nn.Parameter | None

    def __init__(self, scheme: Scheme, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        if not isinstance(scheme.weight, FloatFormat):
            raise TypeError(f"HalfLinear needs 16-bit floats, not {scheme.weight}")
        self.scheme = scheme
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Features and format, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.scheme}"
