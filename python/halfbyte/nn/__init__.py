"""Quantized modules: plain `nn.Module`s with plain tensor buffers.

`QuantizedLinear`, `QuantizedConv2d` and its kin and `QuantizedEmbedding` hold integers, `HalfLinear`, `HalfConv` and
`HalfEmbedding` 16-bit floats. Modules with several
weights (`QuantizedLSTM`, `QuantizedMultiheadAttention`, …) are made of these.
"""

from halfbyte.nn.as_layers import as_embedding, as_linear
from halfbyte.nn.attention import QuantizedMultiheadAttention
from halfbyte.nn.bilinear import QuantizedBilinear
from halfbyte.nn.conv import (
    HalfConv,
    QuantizedConv,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose1d,
    QuantizedConvTranspose2d,
    QuantizedConvTranspose3d,
)
from halfbyte.nn.embedding import HalfEmbedding, QuantizedEmbedding
from halfbyte.nn.embedding_bag import QuantizedEmbeddingBag
from halfbyte.nn.folded import FoldedBatchNorm
from halfbyte.nn.linear import HalfLinear, QuantizedLinear
from halfbyte.nn.packed_weight import PackedWeight, WeightCodes
from halfbyte.nn.quantized_module import QuantizedModule
from halfbyte.nn.recurrent import (
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
)

__all__ = [
    "FoldedBatchNorm",
    "HalfConv",
    "HalfEmbedding",
    "HalfLinear",
    "PackedWeight",
    "QuantizedBilinear",
    "QuantizedConv",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLinear",
    "QuantizedModule",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "WeightCodes",
    "as_embedding",
    "as_linear",
]
