"""Rows of halfbyte for a benchmark that compares libraries on the same layers.

The benchmark (`bench_peers.py`, or another with the same interface) calls `linear_variants(Variant)`, where
`Variant(name, scheme, weight bits, build, activations)` and `build(w, copies)` gives an object with `runs(x)` (one call per
copy of the weight), `output()` and `close()`; arrays are numpy float32.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import halfbyte as hb

sys.path.append(str(Path(__file__).parent))  # the benchmark loads this file by its path
from peers_quant_rows import quant_rows

__all__ = ["conv_impls", "linear_variants", "quant_rows"]

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
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight.data = torch.from_numpy(w)
        model = torch.nn.Sequential(linear)
        hb.quantize_(model, scheme, progress=False)
        self.layers = [copy.deepcopy(model[0]) for _ in range(copies)]

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

    int2_int8 = replace(hb.int4_int8_dynamic(group_size=128), weight=hb.int_weight_only(2, group_size=128).weight)
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
        variant("halfbyte int2_int8_dynamic", "W2A8 g128", 2, build(int2_int8), "int8"),
        variant("halfbyte int2_weight_only", "W2A32 g128", 2, build(hb.int_weight_only(2, group_size=128))),
        variant("halfbyte int1_weight_only", "W1A32 g128", 1, build(hb.int_weight_only(1, group_size=128))),
    ]


# (C_in, height and width, C_out, kernel, stride, groups), padded by kernel // 2, of a batch.
ConvConfig = tuple[int, int, int, int, int, int]
ConvBuild = Callable[[ConvConfig, int], tuple[Callable[[], Tensor], dict[str, object]]]


def conv_impls(threads: int) -> list[tuple[str, ConvBuild]]:
    """A convolution between integers, as the other libraries' INT8 rows, and the module that a user calls."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return [("halfbyte conv_int8 s8", _int8_conv), ("halfbyte int8_dynamic float in and out", _dynamic_conv)]


def _conv_case(config: ConvConfig, batch: int) -> tuple[torch.nn.Conv2d, Tensor, Tensor, float]:
    """Layer, input `[N, C, H, W]` channels last, float32 output, and 10^9 operations: the data of the other rows."""
    channels, size, outputs, kernel, stride, groups = config
    rng = np.random.default_rng(0)
    w = rng.standard_normal((outputs, channels // groups, kernel, kernel), dtype=np.float32)
    w /= np.float32(np.sqrt(kernel * kernel * channels / groups))
    x = np.maximum(rng.standard_normal((batch, channels, size, size), dtype=np.float32), 0)
    conv = torch.nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups)
    conv.weight.data, conv.bias.data = torch.from_numpy(w), torch.zeros(outputs)  # type: ignore[union-attr]
    images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    expected = conv(images)
    return conv, images, expected, 2e-9 * expected.numel() * w[0].size


def _relative_error(y: Tensor, expected: Tensor) -> float:
    return round(float((y - expected).norm() / expected.norm()), 5)


def _int8_conv(config: ConvConfig, batch: int) -> tuple[Callable[[], Tensor], dict[str, object]]:
    conv, x, expected, gop = _conv_case(config, batch)
    model = torch.nn.Sequential(conv)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    layer = model[0]
    # All of [-128, 127] for activations that are 0 and more, as the others' unsigned codes.
    act_scale, act_zero_point = x.max() / 255, torch.tensor(-128, dtype=torch.int32)
    codes = hb.ops.quantize(x, act_scale, act_zero_point, qmin=-128, qmax=127)
    codes = codes.contiguous(memory_format=torch.channels_last)
    out_scale, out_zero_point = 2 * expected.abs().max() / 255, torch.tensor(0, dtype=torch.int32)

    def call() -> Tensor:
        return hb.ops.conv_int8(
            codes,
            layer.qweight,
            layer.scale,
            None,
            layer.bias,
            out_channels=config[2],
            kernel_size=config[3],
            stride=config[4],
            padding=config[3] // 2,
            groups=config[5],
            act_scale=act_scale,
            act_zero_point=act_zero_point,
            out_scale=out_scale,
            out_zero_point=out_zero_point,
        )

    error = _relative_error(call().float() * out_scale, expected)
    return call, {"gop": gop, "relerr": error, "scheme": "static s8 in/out, per-channel s8 W"}


def _dynamic_conv(config: ConvConfig, batch: int) -> tuple[Callable[[], Tensor], dict[str, object]]:
    conv, x, expected, gop = _conv_case(config, batch)
    model = torch.nn.Sequential(conv)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    return lambda: model(x), {"gop": gop, "relerr": _relative_error(model(x), expected), "scheme": "W8A8 dynamic"}
