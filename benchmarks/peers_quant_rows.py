"""Rows of halfbyte for a benchmark that compares libraries on fake quantization and on observers.

The benchmark loads this file and calls `quant_rows(case, torch)`; each row is (key, name, call, elements, bytes that an
element moves). Keys are those of PyTorch's rows, so that both land in the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

import halfbyte as hb

Row = tuple[str, str, Callable[[], object], int, int]

TENSORS = {"1M": (1024, 1024), "16M": (4096, 4096)}
NAME = "halfbyte"


def quant_rows(case: str, torch_module: ModuleType) -> Iterator[Row]:
    """Rows of `case`: `fq` (fake quantize) or `obs` (observers); none for other cases."""
    rows = {"fq": fake_quantize_rows, "obs": observer_rows}.get(case)
    if rows is None:
        return
    for label, shape in TENSORS.items():
        yield from rows(label, shape)


def fake_quantize_rows(label: str, shape: tuple[int, int]) -> Iterator[Row]:
    """Forward alone, and forward with backward, fixed and learned."""
    count = shape[0] * shape[1]
    x, grad = torch.randn(shape), torch.randn(shape)
    leaf = x.clone().requires_grad_()
    scale, zero_point = torch.tensor(0.03), torch.tensor(3, dtype=torch.int32)
    channel_scale, channel_zero_point = torch.full(shape[:1], 0.03), torch.zeros(shape[0], dtype=torch.int32)
    ends = {"qmin": -128, "qmax": 127}

    def forward(axis: int | None, *qparams: Tensor, learned: bool = False) -> Callable[[], object]:
        function = hb.ops.fake_quantize_learned if learned else hb.ops.fake_quantize

        def call() -> object:
            with torch.no_grad():
                return function(x, *qparams, **ends, axis=axis)

        return call

    def both(axis: int | None, *qparams: Tensor, learned: bool = False) -> Callable[[], object]:
        function = hb.ops.fake_quantize_learned if learned else hb.ops.fake_quantize
        leaves = [qparam.clone().float().requires_grad_() for qparam in qparams] if learned else qparams

        def call() -> object:
            for tensor in (leaf, *leaves):
                tensor.grad = None
            return function(leaf, *leaves, **ends, axis=axis).backward(grad)

        return call

    tensor, channel = (None, scale, zero_point), (0, channel_scale, channel_zero_point)
    floats = (None, scale, zero_point.float())
    yield f"fq|per_tensor fwd|{label}", NAME, forward(*tensor), count, 8
    yield f"fq|per_channel fwd|{label}", NAME, forward(*channel), count, 8
    yield f"fq|learnable per_tensor fwd|{label}", NAME, forward(*floats, learned=True), count, 8
    yield f"fq|per_tensor fwd+bwd|{label}", NAME, both(*tensor), count, 20
    yield f"fq|per_channel fwd+bwd|{label}", NAME, both(*channel), count, 20
    yield f"fq|learnable per_tensor fwd+bwd|{label}", NAME, both(*tensor, learned=True), count, 20
    yield f"fq|learnable per_channel fwd+bwd|{label}", NAME, both(*channel, learned=True), count, 20
    yield (
        f"fq|quantize to int8 tensor|{label}",
        NAME,
        lambda: hb.ops.quantize(x, scale, zero_point, qmin=-128, qmax=127),
        count,
        5,
    )
    yield (
        f"fq|quantize per_channel to int8|{label}",
        NAME,
        lambda: hb.ops.quantize(x, channel_scale, channel_zero_point, qmin=-128, qmax=127, axis=0),
        count,
        5,
    )


def observer_rows(label: str, shape: tuple[int, int]) -> Iterator[Row]:
    """Min/max and the histogram, in the rows of the observers that need them."""
    count = shape[0] * shape[1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2048, dtype=torch.int64)

    def histogram() -> object:
        return hb.ops.histogram_update_(counts, x, low=-12.0, high=12.0)

    for observer in ("MinMax", "MovingAverageMinMax"):
        yield f"obs|{observer} fwd|{label}", NAME, lambda: hb.ops.observe_minmax(x), count, 4
    for observer in ("PerChannelMinMax", "MovingAveragePerChannelMinMax"):
        yield f"obs|{observer} fwd|{label}", NAME, lambda: hb.ops.observe_minmax(x, axis=0), count, 4
    yield f"obs|Histogram fwd (range fixed)|{label}", NAME, histogram, count, 4
    yield f"obs|torch.histc 2048|{label}", NAME, histogram, count, 4
