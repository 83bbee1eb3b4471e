"""Times fake_quantize, its learned form, quantize, dequantize, observe_minmax and histograms beside PyTorch's own.

    python benchmarks/bench_elementwise.py [--threads 2] [--repeats 30] [--json FILE]

Ours and theirs alternate, so that both see the same machine; a row is the median of each and their ratio. Rows named "two
clones" compare with the time that copying the tensor twice takes, which is what forward and backward move at least.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

import halfbyte as hb

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

    @property
    def ratio(self) -> float:
        """How many times faster than the peer, by medians."""
        return self.peer_ms / self.ours_ms


def alternate(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> tuple[list[float], list[float]]:
    """Times of both, in milliseconds, taken turn by turn after three calls to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 3):
        for side, call in enumerate((ours, peer)):
            begin = time.perf_counter()
            call()
            if turn >= 3:
                times[side].append((time.perf_counter() - begin) * 1e3)
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
        ("fake_quantize fwd+bwd", "tensor", "two clones", tensor_call, lambda: (plain.clone(), plain.clone())),
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
    """Forward and backward with learned scale and zero point: three gradients."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    found: list[Case] = []
    for granularity, axis, channels in (("tensor", None, 1), ("axis 0", 0, shape[0]), ("last axis", 1, shape[1])):
        scale = torch.full((channels,), 0.03, requires_grad=True)
        zero_point = torch.full((channels,), 3.0, requires_grad=True)

        def ours(v: Tensor, scale: Tensor = scale, zero_point: Tensor = zero_point, axis: int | None = axis) -> Tensor:
            scale.grad = zero_point.grad = None
            return hb.ops.fake_quantize_learned(v, scale, zero_point, qmin=-128, qmax=127, axis=axis)

        def peer(v: Tensor, scale: Tensor = scale, zero_point: Tensor = zero_point, axis: int | None = axis) -> Tensor:
            scale.grad = zero_point.grad = None
            if axis is None:
                return torch._fake_quantize_learnable_per_tensor_affine(v, scale, zero_point, -128, 127, 1.0)
            return torch._fake_quantize_learnable_per_channel_affine(v, scale, zero_point, axis, -128, 127, 1.0)

        calls = forward_backward(ours, x, grad), forward_backward(peer, x, grad)
        found.append(("fake_quantize_learned fwd+bwd", granularity, "torch", *calls))
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
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'ratio':>6} {'ours ms':>9} {'peer ms':>9} {'best ms':>9} {'peer best':>9}  operation")
    rows = []
    for size in args.sizes:
        shape = SIZES[size]
        measured = (*cases(shape), *learned_cases(shape), *histogram_cases(shape))
        for operation, granularity, peer, ours, theirs in measured:
            own_times, peer_times = alternate(ours, theirs, args.repeats)
            row = Row(
                operation=operation,
                granularity=granularity,
                size=size,
                peer=peer,
                ours_ms=statistics.median(own_times),
                peer_ms=statistics.median(peer_times),
                ours_best_ms=min(own_times),
                peer_best_ms=min(peer_times),
            )
            rows.append(row)
            print(
                f"{row.ratio:6.2f} {row.ours_ms:9.3f} {row.peer_ms:9.3f} {row.ours_best_ms:9.3f} "
                f"{row.peer_best_ms:9.3f}  {operation}, {granularity}, {size} against {peer}"
            )
    if args.json:
        results = [asdict(row) | {"ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps({"facts": facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
