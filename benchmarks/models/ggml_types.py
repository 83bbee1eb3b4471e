"""ggml's own quantizers, called in its shared library (`libggml-base.so`, as llama-cpp-python brings it)."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["BITS", "Ggml"]

# Numbers of the enumeration ggml_type, and bits per weight with everything that is stored.
_TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_0": 8, "IQ4_XS": 23, "IQ3_S": 21, "IQ2_S": 22}
BITS = {
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
    "IQ4_XS": 4.25,
    "IQ3_S": 3.4375,
    "IQ2_S": 2.5625,
}
NEEDS_IMPORTANCE = ("IQ2_S",)


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Ggml:
    """The library at a path."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        self._traits = library.ggml_get_type_traits
        self._traits.restype = ctypes.POINTER(_Traits)
        self._traits.argtypes = [ctypes.c_int]

    def round_trip(self, weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
        """The weight `[O, I]` as ggml rounds it.

        Args:
            weight: I is a multiple of 256.
            name: A key of `BITS`.
            importance: `[I]`, mean square of the inputs (the importance matrix), or None.
        """
        weight = weight.detach().float().contiguous()
        rows, columns = weight.shape
        traits = self._traits(_TYPES[name]).contents
        assert columns % traits.block == 0 and traits.quantized
        stored = torch.empty(rows * columns // traits.block * traits.bytes, dtype=torch.uint8)
        weights = None if importance is None else importance.float().contiguous()
        pointer = None if weights is None else weights.data_ptr()
        self._quantize(_TYPES[name], weight.data_ptr(), stored.data_ptr(), 0, rows, columns, pointer)
        result = torch.empty_like(weight)
        traits.to_float(stored.data_ptr(), result.data_ptr(), rows * columns)
        assert 8 * len(stored) == round(BITS[name] * weight.numel())
        return result
