"""Embedding tables with quantized rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.formats import FloatFormat
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.nn.quantized_module import QuantizedModule
from halfbyte.schemes import Scheme


class QuantizedEmbedding(QuantizedModule):
    """`nn.Embedding` with a table in 1 to 8 bits, dequantized row by row as it is read.

    A table tied to an output layer holds the very tensors of that layer (tiles layout); any other is in the rows layout.

    Args:
        scheme: A weight-only scheme.
        weight: Packed table of shape `(num_embeddings, embedding_dim)`.
        dtype: dtype of the output.
        padding_idx: As in `nn.Embedding`; rows are fixed here, so it is only kept for code that asks.

    Shapes:
        indices of any shape, int32 or int64; output `[*indices.shape, embedding_dim]`.
    """

    def __init__(
        self, scheme: Scheme, weight: PackedWeight, dtype: torch.dtype = torch.float32, padding_idx: int | None = None
    ) -> None:
        super().__init__(scheme, weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the table: `[*indices.shape, embedding_dim]`."""
        return ops.embedding_weight_only(
            indices,
            self.qweight,
            self.scale,
            self.zero_point,
            bits=self.bits,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            group_size=self.group_size,
            tiled=self.layout == "tiles",
            dtype=self.dtype,
            codebook=self.codebook,
        )

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.weight}, {self.layout} layout"


class HalfEmbedding(nn.Module):
    """`nn.Embedding` with a bfloat16 or float16 table; outputs keep the dtype the table had.

    Args:
        scheme: `hb.bf16()` or `hb.fp16()`.
        weight: `[num_embeddings, embedding_dim]` in the scheme's dtype.
        dtype: dtype of the output.
        padding_idx: As in `nn.Embedding`.
    """

    def __init__(
        self, scheme: Scheme, weight: nn.Parameter, dtype: torch.dtype, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(scheme.weight, FloatFormat):
            raise TypeError(f"HalfEmbedding needs 16-bit floats, not {scheme.weight}")
        self.scheme = scheme
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = weight
        self.dtype = dtype
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the table: `[*indices.shape, embedding_dim]`."""
        return nn.functional.embedding(indices, self.weight, self.padding_idx).to(self.dtype)

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"
