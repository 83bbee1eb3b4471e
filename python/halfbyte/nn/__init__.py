"""Quantized modules: plain `nn.Module`s with plain tensor buffers."""

from halfbyte.nn.embedding import HalfEmbedding, QuantizedEmbedding
from halfbyte.nn.linear import HalfLinear, QuantizedLinear
from halfbyte.nn.packed_weight import PackedWeight, WeightCodes
from halfbyte.nn.quantized_module import QuantizedModule

__all__ = [
    "HalfEmbedding",
    "HalfLinear",
    "PackedWeight",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedModule",
    "WeightCodes",
]
