"""Rows of halfbyte for a benchmark that compares libraries on the same layers.

The benchmark loads this file and calls `linear_variants(Variant)`, where `Variant(name, scheme, weight bits, build,
activations)` and `build(w, copies)` gives an object with `runs(x)` (one call per copy of the weight), `output()` and
`close()`; arrays are numpy float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import halfbyte as hb

Array = np.ndarray


class Layer(Protocol):
    """What `build` gives."""

    def runs(self, x: Array) -> list[Callable[[], Tensor]]: ...
    def output(self) -> Array: ...
    def close(self) -> None: ...


Build = Callable[[Array, int], Layer]


class VariantType(Protocol):
    """The benchmark's own record of a row."""

    def __call__(self, name: str, scheme: str, wbits: int, build: Build, act: str = "fp32") -> object: ...


class QuantizedLayer:
    """Copies of one quantized `nn.Linear`."""

    def __init__(self, w: Array, copies: int, scheme: hb.Scheme, dtype: torch.dtype) -> None:
        torch.set_grad_enabled(False)
        self.dtype = dtype
        self.layers: list[torch.nn.Module] = []
        for _ in range(copies):
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight.data = torch.from_numpy(w)
            model = torch.nn.Sequential(linear)
            hb.quantize_(model, scheme, progress=False)
            self.layers.append(model[0])

    def runs(self, x: Array) -> list[Callable[[], Tensor]]:
        """One call per copy, on the same input."""
        self.x = torch.from_numpy(x).to(self.dtype)
        return [lambda layer=layer: layer(self.x) for layer in self.layers]  # type: ignore[misc]

    def output(self) -> Array:
        """Result of the first copy."""
        return self.layers[0](self.x).float().numpy()

    def close(self) -> None:
        """Frees the copies."""
        self.layers = []


def linear_variants(variant: VariantType) -> list[object]:
    """Every scheme that a user would pick for a linear layer."""

    def build(scheme: hb.Scheme, dtype: torch.dtype = torch.float32) -> Build:
        return lambda w, copies: QuantizedLayer(w, copies, scheme, dtype)

    return [
        variant("halfbyte int8_dynamic", "W8A8 dynamic per token", 8, build(hb.int8_dynamic()), "int8"),
        variant("halfbyte int4_int8_dynamic", "W4A8 g128", 4, build(hb.int4_int8_dynamic(group_size=128)), "int8"),
        variant("halfbyte int8_weight_only", "W8A32", 8, build(hb.int8_weight_only())),
        variant("halfbyte int4_weight_only", "W4A32 g128 asym", 4, build(hb.int4_weight_only(group_size=128))),
        variant(
            "halfbyte int4_weight_only bf16",
            "W4A16 g128 asym",
            4,
            build(hb.int4_weight_only(group_size=128), torch.bfloat16),
            "bf16",
        ),
        variant("halfbyte int2_weight_only", "W2A32 g128", 2, build(hb.int_weight_only(2, group_size=128))),
        variant("halfbyte int1_weight_only", "W1A32 g128", 1, build(hb.int_weight_only(1, group_size=128))),
    ]


def conv_impls(threads: int) -> list[object]:
    """No convolutions yet."""
    return []


def quant_rows(case: str, torch_module: object) -> list[object]:
    """No rows of elementwise operators here: `bench_elementwise.py` has them."""
    return []
