"""Times the linear operators beside PyTorch's float32 and bfloat16 `F.linear`.

    python benchmarks/bench_linear.py [--threads 2] [--shapes 4096x4096] [--rows 1,16,256] [--hot] [--json FILE]

All contenders of a shape take turns, so that they see the same machine; a row is the median of each. Cold (the default):
calls rotate over at least 256 MB of copies of the weights, as a model larger than the caches does. Ratios are those of
PyTorch float32 to ours. `read` is the part of the machine's read bandwidth that the weights stream at, measured here by a
sum over 1 GB. Accuracy of every row is checked against float64 first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import halfbyte as hb

SHAPES = ["4096x4096", "3072x768", "768x768", "11008x4096", "4096x11008"]  # out_features x in_features
ROWS = [1, 4, 16, 64, 256, 1024]
COLD_BYTES = 256 << 20
GROUP = 128
TOLERANCE = 2e-5  # of the sum of magnitudes: rounding of float32 sums in order

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute the layer: `calls` take turns over copies of the weights; `x_hat` and `w_hat` are what it means."""

    name: str
    weight_bytes: int
    calls: list[Call]
    w_hat: Tensor | None = None
    x_hat: Callable[[Tensor], Tensor] = Tensor.double


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement; times in milliseconds, rates in GB/s and 1e9 operations a second (a multiply-add is two)."""

    contender: str
    shape: str
    rows: int
    cold: bool
    median_ms: float
    best_ms: float
    ratio_to_fp32: float
    weight_gbs: float
    gops: float
    fraction_of_read: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine gives, measured in the same run."""

    read_gbs: float


def measure_limits() -> Limits:
    """Read bandwidth by a sum over 1 GB; the best of some."""

    def best(call: Callable[[], object], repeats: int) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times)

    large = torch.zeros(1 << 28)
    return Limits(large.numel() * 4 / best(large.sum, 7) / 1e9)


def quantized(weight: Tensor, bits: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric rounding to nearest: packed codes, `[G, O]` float16 scales, and the float64 weight they stand for."""
    out_features, in_features = weight.shape
    group = group_size or in_features
    grouped = weight.reshape(out_features, -1, group)
    scale = (grouped.abs().amax(2) / (2 ** (bits - 1) - 1)).half()
    codes = torch.clamp(torch.round(grouped / scale.float().unsqueeze(2)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    w_hat = (codes.double() * scale.double().unsqueeze(2)).reshape(weight.shape)
    packed = hb.ops.pack(codes.reshape(weight.shape).to(torch.int8), bits, layout="tiles", group_size=group)
    return packed, scale.t().contiguous(), w_hat


def round_rows(x: Tensor) -> Tensor:
    """What dynamic INT8 activations stand for."""
    codes, scale = hb.functional.quantize_rows_dynamic(x)
    return codes.double() * scale.double()


def ours(name: str, weight: Tensor, bits: int, group_size: int | None, int8: bool, cold: bool) -> Contender:
    """One of our operators on copies of the quantized weight."""
    qweight, scale, w_hat = quantized(weight, bits, group_size)
    size = qweight.numel() + scale.numel() * 2
    operator = hb.ops.linear_int8 if int8 else hb.ops.linear_weight_only
    group = group_size or weight.shape[1]

    def call(codes: Tensor, scales: Tensor) -> Call:
        return lambda x: operator(x, codes, scales, bits=bits, out_features=weight.shape[0], group_size=group)

    calls = [call(qweight.clone(), scale.clone()) for _ in range(copies(size, cold))]
    return Contender(name, size, calls, w_hat, round_rows if int8 else Tensor.double)


def nf4(name: str, weight: Tensor, group_size: int, cold: bool) -> Contender:
    """The weight-only operator on NF4 codes."""
    weight_format = hb.CodebookFormat(hb.formats.NF4_VALUES, hb.PerGroup(group_size), torch.float16)
    rounded = hb.RTN().round(weight, weight_format, None)
    packer = hb.nn.packed_weight.WeightPacker(weight_format, "tiles", (weight.shape[0], weight.shape[1]))
    packer.add(rounded)
    packed = packer.packed()
    size = packed.qweight.numel() + packed.scale.numel() * 2
    options = {"bits": 4, "out_features": weight.shape[0], "group_size": group_size, "codebook": packed.codebook}

    def call(codes: Tensor, scales: Tensor) -> Call:
        return lambda x: hb.ops.linear_weight_only(x, codes, scales, **options)  # type: ignore[arg-type]

    calls = [call(packed.qweight.clone(), packed.scale.clone()) for _ in range(copies(size, cold))]
    return Contender(name, size, calls, rounded.dequantize(group_size).double())


def peer(name: str, weight: Tensor, dtype: torch.dtype, cold: bool) -> Contender:
    """PyTorch's own layer in a float type, on inputs of that type."""
    size = weight.numel() * dtype.itemsize

    def call(w: Tensor) -> Call:
        return lambda x: F.linear(x, w)

    return Contender(name, size, [call(weight.to(dtype, copy=True)) for _ in range(copies(size, cold))])


def copies(size: int, cold: bool) -> int:
    return -(-COLD_BYTES // size) if cold else 1


def contenders(weight: Tensor, cold: bool) -> Iterator[Contender]:
    """PyTorch float32 first: ratios are to it."""
    yield peer("torch fp32", weight, torch.float32, cold)
    yield peer("torch bf16", weight, torch.bfloat16, cold)
    yield ours("int8 dynamic", weight, 8, None, True, cold)
    yield ours("int4 g128 x int8", weight, 4, GROUP, True, cold)
    yield ours("int8 weight-only", weight, 8, None, False, cold)
    yield ours("int4 g128 weight-only", weight, 4, GROUP, False, cold)
    yield nf4("nf4 g128 weight-only", weight, GROUP, cold)
    yield ours("int2 g128 weight-only", weight, 2, GROUP, False, cold)


def check_accuracy(contender: Contender, x: Tensor) -> None:
    """First and last row against float64.

    Raises:
        AssertionError: One of them is not what the layer means.
    """
    if contender.w_hat is None:
        return
    y = contender.calls[0](x)[[0, -1]].double()
    x_hat = contender.x_hat(x[[0, -1]])
    magnitude = x_hat.abs() @ contender.w_hat.abs().t()
    error = float(((y - x_hat @ contender.w_hat.t()).abs() / magnitude).max())
    assert error < TOLERANCE, f"{contender.name}: error {error:.1e} of the magnitudes"


def time_turns(calls: list[list[Callable[[], object]]], budget: float) -> list[list[float]]:
    """Times of every contender in milliseconds, turn by turn, for about `budget` seconds."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    turn = 0
    while turn < 7 or (time.perf_counter() < end and turn < 2000):
        for side, copies_of_side in enumerate(calls):
            call = copies_of_side[turn % len(copies_of_side)]
            begin = time.perf_counter()
            call()
            if turn >= 2:
                times[side].append((time.perf_counter() - begin) * 1e3)
        turn += 1
    return times


def measure(
    shape: str, row_counts: list[int], only: list[str], cold: bool, budget: float, limits: Limits
) -> Iterator[Row]:
    """All rows of one shape."""
    out_features, in_features = (int(size) for size in shape.split("x"))
    torch.manual_seed(0)
    every = contenders(torch.randn(out_features, in_features) / in_features**0.5, cold)
    sides = [side for index, side in enumerate(every) if index == 0 or not only or side.name in only]
    for rows in row_counts:
        x = torch.randn(rows, in_features)
        for side in sides:
            check_accuracy(side, x)
        half = x.bfloat16()
        calls = [[partial(c, half if side.name == "torch bf16" else x) for c in side.calls] for side in sides]
        times = time_turns(calls, budget)
        medians = [statistics.median(t) for t in times]
        for side, side_times, median in zip(sides, times, medians, strict=True):
            weight_gbs = side.weight_bytes / median / 1e6
            gops = 2 * rows * out_features * in_features / median / 1e6
            yield Row(
                contender=side.name,
                shape=shape,
                rows=rows,
                cold=cold,
                median_ms=median,
                best_ms=min(side_times),
                ratio_to_fp32=medians[0] / median,
                weight_gbs=weight_gbs,
                gops=gops,
                fraction_of_read=weight_gbs / limits.read_gbs,
            )


def machine(threads: int, limits: Limits) -> dict[str, object]:
    """Facts that make a result comparable."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "level": hb.cpu_capability(),
        "torch": torch.__version__,
        "halfbyte": hb.__version__,
        "python": platform.python_version(),
        "limits": asdict(limits),
    }


def main() -> None:
    """Prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=SHAPES)
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=ROWS)
    parser.add_argument("--only", type=lambda s: s.split(","), default=[], help="contenders beside torch fp32, by name")
    parser.add_argument("--hot", action="store_true", help="one copy of each weight")
    parser.add_argument("--seconds", type=float, default=3.0, help="for all contenders of one shape and row count")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    limits = measure_limits()
    facts = machine(arguments.threads, limits)
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    rows = []
    for shape in arguments.shapes:
        for row in measure(shape, arguments.rows, arguments.only, not arguments.hot, arguments.seconds, limits):
            rows.append(row)
            print(
                f"{row.ratio_to_fp32:6.2f}x  {row.shape:>10} M={row.rows:<5}{row.contender:<22} {row.median_ms:8.3f} ms "
                f"(best {row.best_ms:.3f})  {row.weight_gbs:6.1f} GB/s = {row.fraction_of_read:4.0%} read  "
                f"{row.gops:7.1f} GOPS"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
