"""Bilinear forms with their weight in a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbyte.nn.as_layers import as_linear


class QuantizedBilinear(nn.Module):
    """`nn.Bilinear`, `y[o] = x1ᵀ A[o] x2 + b[o]`, from the part `linear` that multiplies `x2` by all of A at once.

    Args:
        bilinear: The module whose place it takes.

    Shapes:
        inputs `[..., in1_features]` and `[..., in2_features]`, output `[..., out_features]`.

    Example:
        >>> model = nn.ModuleDict({"form": nn.Bilinear(16, 64, 8)})
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> model["form"](torch.randn(5, 16), torch.randn(5, 64)).shape
        torch.Size([5, 8])
    """

    bias: nn.Parameter | None

    def __init__(self, bilinear: nn.Bilinear) -> None:
        super().__init__()
        self.in1_features, self.in2_features = bilinear.in1_features, bilinear.in2_features
        self.out_features = bilinear.out_features
        self.linear = as_linear(bilinear.weight.reshape(-1, self.in2_features))
        self.register_parameter("bias", bilinear.bias)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """`[..., out_features]`.

        Raises:
            ValueError: features or leading sizes that do not fit.
        """
        expected = (*input2.shape[:-1], self.in1_features), (*input1.shape[:-1], self.in2_features)
        if (tuple(input1.shape), tuple(input2.shape)) != expected:
            raise ValueError(
                f"inputs have shapes {tuple(input1.shape)} and {tuple(input2.shape)}; they need {self.in1_features} and "
                f"{self.in2_features} features in their last dimension and the same sizes before it"
            )
        forms = self.linear(input2).unflatten(-1, (self.out_features, self.in1_features))
        y = torch.matmul(forms, input1.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}"
