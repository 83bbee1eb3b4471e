"""The operators, for people who build their own layers. Nothing else in the package mentions `torch.ops`."""

from halfbyte.ops.elementwise import dequantize, fake_quantize, observe_minmax, quantize, search_qparams
from halfbyte.ops.packing import Layout, pack, packed_shape, unpack

__all__ = [
    "Layout",
    "dequantize",
    "fake_quantize",
    "observe_minmax",
    "pack",
    "packed_shape",
    "quantize",
    "search_qparams",
    "unpack",
]
