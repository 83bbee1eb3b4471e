"""Times fake_quantize, its learned forms, quantize, dequantize, observe_minmax and histograms beside PyTorch's own.

    python benchmarks/bench_elementwise.py [--threads 2] [--repeats 30] [--in-a-row 10] [--json FILE]

A row is the median of ours, of theirs and of the limit, which take turns of `--in-a-row` calls after one that does not count;
with 1 they alternate call by call, and each finds in the cache what the other left there. The limit of forward and backward is
`x.clone()` and `x + grad`, which read and write what they read and write; that of observers is reading the tensor at the speed
of `limits.c`, where it does not fit the cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

import halfbyte as hb
from limits import measure_limits

SIZES = {"1M": (1024, 1024), "16M": (4096, 4096)}
GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: medians and the fastest of all repeats, in milliseconds."""

    operation: str
    granularity: str
    size: str
    peer: str
    ours_ms: float
    peer_ms: float
    ours_best_ms: float
    peer_best_ms: float
    limit_ms: float | None

    @property
    def ratio(self) -> float:
        """How many times faster than the peer, by medians."""
        return self.peer_ms / self.ours_ms


def take_turns(calls: Sequence[Callable[[], object]], repeats: int, in_a_row: int) -> list[list[float]]:
    """Times of all, in milliseconds, by turns of `in_a_row` calls."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(-1, ceil(repeats / in_a_row)):  # the first is to warm up
        for call, found in zip(calls, times, strict=True):
            for i in range(in_a_row + (in_a_row > 1)):
                begin = time.perf_counter()
                call()
                if turn >= 0 and (i or in_a_row == 1):
                    found.append((time.perf_counter() - begin) * 1e3)
    return times


def forward_backward(f: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    """A call of `f` and its gradient."""

    def call() -> object:
        x.grad = None
        return f(x).backward(grad)

    return call


Case = tuple[str, str, str, Callable[[], object], Callable[[], object]]


def cases(shape: tuple[int, int]) -> list[Case]:
    """(operation, granularity, peer, ours, theirs) for one size; the peer of groups and tokens is per channel."""
    rows, columns = shape
    torch.manual_seed(0)
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    plain = x.detach()
    grouped = plain.reshape(-1, GROUP).clone().requires_grad_()
    grouped_grad = grad.reshape(-1, GROUP)
    scale, zero = torch.tensor(0.03), torch.tensor(3, dtype=torch.int32)

    def qparams(*size: int) -> tuple[Tensor, Tensor]:
        return torch.rand(size) * 0.02 + 0.02, torch.randint(-5, 6, size, dtype=torch.int32)

    first, last = qparams(rows), qparams(columns)
    groups = qparams(rows, columns // GROUP)
    flat_groups = (groups[0].reshape(-1), groups[1].reshape(-1))
    fake, theirs = hb.ops.fake_quantize, torch.fake_quantize_per_channel_affine
    ends = {"qmin": -128, "qmax": 127}
    tensor_call = forward_backward(lambda v: fake(v, scale, zero, **ends), x, grad)
    peer_axis0 = forward_backward(lambda v: theirs(v, *first, 0, -128, 127), x, grad)
    codes = hb.ops.quantize(plain, scale, zero, **ends)
    quantized = torch.quantize_per_tensor(plain, 0.03, 3, torch.qint8)
    channel_codes = hb.ops.quantize(plain, *first, axis=0, **ends)
    zeros64 = first[1].long()
    quantized_axis0 = torch.quantize_per_channel(plain, first[0].double(), zeros64, 0, torch.qint8)
    return [
        (
            "fake_quantize fwd+bwd",
            "tensor",
            "torch",
            tensor_call,
            forward_backward(lambda v: torch.fake_quantize_per_tensor_affine(v, scale, zero, -128, 127), x, grad),
        ),
        (
            "fake_quantize fwd+bwd",
            "axis 0",
            "torch",
            forward_backward(lambda v: fake(v, *first, axis=0, **ends), x, grad),
            peer_axis0,
        ),
        (
            "fake_quantize fwd+bwd",
            "last axis",
            "torch",
            forward_backward(lambda v: fake(v, *last, axis=1, **ends), x, grad),
            forward_backward(lambda v: theirs(v, *last, 1, -128, 127), x, grad),
        ),
        (
            "fake_quantize fwd+bwd",
            f"group {GROUP}",
            "torch per channel",
            forward_backward(lambda v: fake(v, *groups, group_size=GROUP, **ends), x, grad),
            forward_backward(lambda v: theirs(v, *flat_groups, 0, -128, 127), grouped, grouped_grad),
        ),
        (
            "fake_quantize fwd+bwd",
            "token",
            "torch per channel",
            forward_backward(
                lambda v: fake(v, first[0][:, None], first[1][:, None], group_size=columns, **ends), x, grad
            ),
            peer_axis0,
        ),
        (
            "quantize",
            "tensor",
            "torch",
            lambda: hb.ops.quantize(plain, scale, zero, **ends),
            lambda: torch.quantize_per_tensor(plain, 0.03, 3, torch.qint8),
        ),
        (
            "quantize",
            "axis 0",
            "torch",
            lambda: hb.ops.quantize(plain, *first, axis=0, **ends),
            lambda: torch.quantize_per_channel(plain, first[0], zeros64, 0, torch.qint8),
        ),
        ("dequantize", "tensor", "torch", lambda: hb.ops.dequantize(codes, scale, zero), quantized.dequantize),
        (
            "dequantize",
            "axis 0",
            "torch",
            lambda: hb.ops.dequantize(channel_codes, *first, axis=0),
            quantized_axis0.dequantize,
        ),
        ("observe_minmax", "tensor", "torch.aminmax", lambda: hb.ops.observe_minmax(plain), plain.aminmax),
        (
            "observe_minmax",
            "axis 0",
            "torch.aminmax",
            lambda: hb.ops.observe_minmax(plain, axis=0),
            lambda: plain.aminmax(dim=1),
        ),
        (
            "observe_minmax",
            "last axis",
            "torch.aminmax",
            lambda: hb.ops.observe_minmax(plain, axis=1),
            lambda: plain.aminmax(dim=0),
        ),
        (
            "observe_minmax",
            f"group {GROUP}",
            "torch.aminmax",
            lambda: hb.ops.observe_minmax(plain, group_size=GROUP),
            lambda: plain.reshape(rows, -1, GROUP).aminmax(dim=-1),
        ),
    ]


def learned_cases(shape: tuple[int, int]) -> list[Case]:
    """Forward and backward with what is trained: the gradients of x, scale and zero point, or of x and scale."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    seq, evenly = (-0.75, -0.25, 0.25, 0.75), tuple(torch.linspace(-1, 1, 16).tolist())

    def qparams(*size: int) -> tuple[Tensor, Tensor]:
        return torch.full(size, 0.03, requires_grad=True), torch.full(size, 3.0, requires_grad=True)

    def learned(size: tuple[int, ...], **options: Any) -> Callable[[], object]:
        return trained(
            lambda v, *q: hb.ops.fake_quantize_learned(v, *q, qmin=-128, qmax=127, **options), qparams(*size)
        )

    def codebook(group_size: int, values: tuple[float, ...]) -> Callable[[], object]:
        scale = torch.full((shape[0], shape[1] // group_size), 0.5, requires_grad=True)
        return trained(lambda v, s: hb.ops.fake_quantize_codebook(v, s, values, group_size=group_size), (scale,))

    def trained(f: Callable[..., Tensor], tensors: tuple[Tensor, ...], leaf: Tensor = x) -> Callable[[], object]:
        def call(v: Tensor) -> Tensor:
            for tensor in tensors:
                tensor.grad = None
            return f(v, *tensors)

        return forward_backward(call, leaf, grad.reshape(leaf.shape))

    def per_channel(leaf: Tensor, axis: int) -> Callable[[], object]:
        function = torch._fake_quantize_learnable_per_channel_affine
        return trained(lambda v, s, z: function(v, s, z, axis, -128, 127, 1.0), qparams(leaf.shape[axis]), leaf)

    function = torch._fake_quantize_learnable_per_tensor_affine
    per_tensor = trained(lambda v, s, z: function(v, s, z, -128, 127, 1.0), qparams(1))
    found: list[Case] = [
        *(
            (
                "fake_quantize_learned fwd+bwd",
                f"tensor, {name}",
                "torch per tensor",
                learned((1,), estimator=name),
                per_tensor,
            )
            for name in ("rounded", "lsq", "pact")
        ),
        ("fake_quantize_learned fwd+bwd", "axis 0", "torch", learned(shape[:1], axis=0), per_channel(x, 0)),
        ("fake_quantize_learned fwd+bwd", "last axis", "torch", learned(shape[1:], axis=1), per_channel(x, 1)),
    ]
    for group in (GROUP, 32):
        leaf = x.detach().reshape(-1, group).clone().requires_grad_()
        name, peer = f"group {group}", ("torch per channel", per_channel(leaf, 0))
        ours = learned((shape[0], shape[1] // group), group_size=group)
        found.append(("fake_quantize_learned fwd+bwd", name, peer[0], ours, peer[1]))
        for values in (seq, evenly):
            entries = f"{name}, {len(values)} entries"
            found.append(("fake_quantize_codebook fwd+bwd", entries, peer[0], codebook(group, values), peer[1]))
    return found


def histogram_cases(shape: tuple[int, int]) -> list[Case]:
    """2,048 bins over a fixed range that holds all values."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    counts = torch.zeros(2048, dtype=torch.int64)
    observer = HistogramObserver(bins=2048)
    observer(2 * x)  # from here on its range is wide enough

    def ours() -> Tensor:
        return hb.ops.histogram_update_(counts, x, low=-10.0, high=10.0)

    return [
        ("histogram", "2048 bins", "HistogramObserver", ours, lambda: observer(x)),
        ("histogram", "2048 bins", "torch.histc", ours, lambda: torch.histc(x, 2048, -10.0, 10.0)),
    ]


def cpu_name() -> str:
    """The CPU's model name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Prints the table; writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--in-a-row", type=int, default=10)
    parser.add_argument("--only", default="", help="operations whose name begins so")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = {
        "cpu": cpu_name(),
        "level": hb.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "halfbyte": hb.__version__,
        "repeats": args.repeats,
        "in_a_row": args.in_a_row,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    read_gbs = measure_limits(args.threads).get("read_gbs")
    print(f"{'ratio':>6} {'ours ms':>9} {'peer ms':>9} {'limit ms':>9} {'best ms':>9} {'peer best':>9}  operation")
    rows = []
    for size in args.sizes:
        shape = SIZES[size]
        x, grad = torch.randn(shape), torch.randn(shape)
        measured = (*cases(shape), *learned_cases(shape), *histogram_cases(shape))
        for operation, granularity, peer, ours, theirs in measured:
            if not operation.startswith(args.only):
                continue
            calls = [ours, theirs]
            if "bwd" in operation:
                calls.append(lambda x=x, grad=grad: (x.clone(), x + grad))
            own_times, peer_times, *limit_times = take_turns(calls, args.repeats, args.in_a_row)
            limit = statistics.median(limit_times[0]) if limit_times else None
            if operation == "observe_minmax" and size == "16M" and read_gbs:
                limit = x.numel() * 4 / read_gbs * 1e-6
            row = Row(
                operation=operation,
                granularity=granularity,
                size=size,
                peer=peer,
                ours_ms=statistics.median(own_times),
                peer_ms=statistics.median(peer_times),
                ours_best_ms=min(own_times),
                peer_best_ms=min(peer_times),
                limit_ms=limit,
            )
            rows.append(row)
            print(
                f"{row.ratio:6.2f} {row.ours_ms:9.3f} {row.peer_ms:9.3f} {f'{limit:.3f}' if limit else '':>9} "
                f"{row.ours_best_ms:9.3f} {row.peer_best_ms:9.3f}  {operation}, {granularity}, {size} against {peer}",
                flush=True,
            )
    if args.json:
        results = [asdict(row) | {"ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps({"facts": facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
