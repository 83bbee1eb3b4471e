"""Looks for cliffs: odd sizes beside the next multiple, and how cost grows where a size doubles.

    python benchmarks/bench_shapes.py [--threads 2] [--json FILE]

A row gives the cost of one shape relative to another, both taking turns in the same run, medians. Odd sizes (N+1 outputs, K+1
inputs) are beside the next multiple of 64; the limit is 1.10. Doublings start past the caches (weights of 4 MB and more, copies
rotated as in bench_linear.py); the limit is 2.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench_linear import machine, measure_limits, ours, time_turns

OPERATORS = {  # name: bits, INT8 activations
    "int8 dynamic": (8, True),
    "int4 x int8": (4, True),
    "int8 weight-only": (8, False),
    "int4 weight-only": (4, False),
}
Shape = tuple[int, int, int]  # tokens, outputs, inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Cost of `shape` relative to `beside`; times in milliseconds."""

    operator: str
    kind: str
    shape: Shape
    beside: Shape
    median_ms: float
    beside_ms: float
    ratio: float
    limit: float


def comparisons() -> Iterator[tuple[str, float, Shape, Shape]]:
    """What is compared with what: kind, limit, shape, and the one beside it."""
    for tokens in (1, 16, 128):
        yield "N+1", 1.10, (tokens, 1025, 1024), (tokens, 1088, 1024)
        yield "K+1", 1.10, (tokens, 1024, 1025), (tokens, 1024, 1088)
    for tokens in (1, 64):
        yield "2N", 2.2, (tokens, 8192, 2048), (tokens, 4096, 2048)
        yield "2K", 2.2, (tokens, 2048, 8192), (tokens, 2048, 4096)
    for tokens in (64, 128, 256):
        yield "2M", 2.2, (2 * tokens, 2048, 4096), (tokens, 2048, 4096)


def measure(operator: str, kind: str, limit: float, shapes: tuple[Shape, Shape], seconds: float) -> Row:
    """Both shapes in turns; copies of the weights are rotated where they are past the caches."""
    bits, int8 = OPERATORS[operator]
    calls = []
    for tokens, outputs, inputs in shapes:
        weight = torch.randn(outputs, inputs) / inputs**0.5
        contender = ours(operator, weight, bits, None, int8, cold=weight.numel() >= 4 << 20)
        x = torch.randn(tokens, inputs)
        calls.append([partial(call, x) for call in contender.calls])
    medians = [statistics.median(times) for times in time_turns(calls, seconds)]
    return Row(
        operator=operator,
        kind=kind,
        shape=shapes[0],
        beside=shapes[1],
        median_ms=medians[0],
        beside_ms=medians[1],
        ratio=medians[0] / medians[1],
        limit=limit,
    )


def main() -> None:
    """Prints the rows and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.4, help="for one comparison")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    facts = machine(arguments.threads, measure_limits())
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    rows = []
    for operator in OPERATORS:
        for kind, limit, shape, beside in comparisons():
            row = measure(operator, kind, limit, (shape, beside), arguments.seconds)
            rows.append(row)
            verdict = "" if row.ratio <= limit else f"  above {limit}"
            print(f"{row.ratio:5.2f}  {operator:<17}{kind:<4} {shape!s:>19} beside {beside!s:>19}{verdict}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
