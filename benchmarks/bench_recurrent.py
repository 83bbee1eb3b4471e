"""Times LSTM layers and bags of embeddings beside PyTorch's float32 and its own quantized forms.

    python benchmarks/bench_recurrent.py [--threads 2] [--parts lstm,bag,attention] [--seconds 2] [--json FILE]

All contenders of a case take turns, so that they see the same machine; a figure is the median of each. LSTMs have one layer of
h inputs and h units and run 64 steps, or 12 such layers and run one step, so that no weight is in a cache;
`nn.quantized.dynamic.LSTM` is the one that `torch.ao.quantization.quantize_dynamic` makes. Attention is that of 12 heads of 64,
without projections. Bags are sums of 32 random rows of a table of 1,000,000 x 128, 512 bags a call, other rows at every call.
Every contender's output is compared with float32 first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import halfbyte as hb
from bench_elementwise import cpu_name

LSTM_CASES = {  # hidden size, batch, steps, layers
    "lstm h512 batch 1": (512, 1, 64, 1),
    "lstm h512 batch 16": (512, 16, 64, 1),
    "lstm h1024 batch 1": (1024, 1, 64, 1),
    "lstm h1024 batch 16": (1024, 16, 64, 1),
    "lstm h1024 batch 1, one step of 12 layers": (1024, 1, 1, 12),
}
ATTENTION_CASES = [(8, 128), (1, 512)]  # batch, length
ROWS, DIM, BAGS, BAG = 1_000_000, 128, 512, 32
INDEX_SETS = 16
TOLERANCE = {8: 0.05, 4: 0.25, 2: 0.9}  # largest relative error of the output against float32, by bits of the weights

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a case."""

    name: str
    call: Call
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement, in milliseconds; ratios say how many times faster than the others it is."""

    case: str
    contender: str
    median_ms: float
    best_ms: float
    ratio_to_float: float
    ratio_to_quantized: float


def lstm_contenders(hidden: int, batch: int, steps: int = 64, layers: int = 1) -> Iterator[Contender]:
    """PyTorch's float32 first, its dynamic INT8 second."""
    torch.manual_seed(0)
    x = torch.randn(steps, batch, hidden)
    torch.backends.quantized.engine = "x86"

    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.LSTM(hidden, hidden, layers)).eval()

    def contender(name: str, model: nn.Module, bits: int) -> Contender:
        return Contender(name, lambda: model(x)[0], TOLERANCE[bits])

    yield contender("torch float32", model(), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated, and still what a user would pick
        theirs = torch.ao.quantization.quantize_dynamic(model(), {nn.LSTM}, dtype=torch.qint8)
    yield contender("torch dynamic int8", theirs, 8)
    for name, scheme, bits in (
        ("int8 dynamic", hb.int8_dynamic(), 8),
        ("int4 g128 x int8", hb.int4_int8_dynamic(128), 4),
        ("int8 weight-only", hb.int8_weight_only(), 8),
        ("int4 g128 weight-only", hb.int4_weight_only(128), 4),
    ):
        ours = model()
        hb.quantize_(ours, scheme, algorithms=[hb.algorithms.RTN()], progress=False)
        yield contender(name, ours, bits)


def bag_contenders(bits: int) -> Iterator[Contender]:
    """PyTorch's float32 first, its quantized table of the same width second, then ours."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, ROWS, (BAGS * BAG,), generator=generator) for _ in range(INDEX_SETS)]
    offsets = torch.arange(0, BAGS * BAG, BAG)

    def contender(name: str, call: Callable[[Tensor], Tensor]) -> Contender:
        turn = iter(range(1 << 60))
        return Contender(name, lambda: call(sets[next(turn) % INDEX_SETS]), TOLERANCE[bits])

    weight = bag.weight.detach()
    yield contender("torch float32", lambda ids: bag(ids, offsets))
    ops = torch.ops.quantized
    if bits == 8:
        packed = ops.embedding_bag_byte_prepack(weight)
        theirs = ops.embedding_bag_byte_rowwise_offsets
    else:
        packed = getattr(ops, f"embedding_bag_{bits}bit_prepack")(weight)
        theirs = getattr(ops, f"embedding_bag_{bits}bit_rowwise_offsets")
    yield contender(f"torch {bits}-bit", lambda ids: theirs(packed, ids, offsets))
    model = nn.ModuleDict({"bag": bag})
    recipe = hb.Recipe(default=None, overrides={nn.EmbeddingBag: hb.int_weight_only(bits)})
    hb.quantize_(model, recipe, algorithms=[hb.algorithms.RTN()], progress=False)
    yield contender(f"int{bits} per row", lambda ids: model["bag"](ids, offsets))


def attention_contenders(batch: int, length: int) -> Iterator[Contender]:
    """PyTorch's fused float32 first, the same in separate products second, then INT8 products around its softmax."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 12, length, 64) for _ in range(3))

    def separate() -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) * 0.125, dim=-1) @ v

    def int8() -> Tensor:
        weights = torch.softmax(hb.ops.attention_scores_int8(q, k) * 0.125, dim=-1)
        return hb.ops.attention_values_int8(weights, v)

    yield Contender("torch float32, fused", lambda: nn.functional.scaled_dot_product_attention(q, k, v), TOLERANCE[8])
    yield Contender("torch float32, separate", separate, TOLERANCE[8])
    yield Contender("int8 scores and values", int8, TOLERANCE[8])


def check_outputs(contenders: list[Contender]) -> None:
    """First call of each, all on the same input.

    Raises:
        AssertionError: one is farther from float32 than its width explains.
    """
    expected = contenders[0].call()
    for contender in contenders[1:]:
        output = contender.call()
        error = ((output - expected).norm() / expected.norm()).item()
        assert error < contender.tolerance, f"{contender.name}: relative error {error:.3f}"


def measure(case: str, contenders: list[Contender], seconds: float) -> Iterator[Row]:
    """Medians of all contenders, taken turn by turn for about `seconds`."""
    check_outputs(contenders)
    times: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for contender, own in zip(contenders, times, strict=True):
            begin = time.perf_counter()
            contender.call()
            own.append((time.perf_counter() - begin) * 1e3)
    medians = [statistics.median(own) for own in times]
    for contender, own, median in zip(contenders, times, medians, strict=True):
        yield Row(
            case=case,
            contender=contender.name,
            median_ms=median,
            best_ms=min(own),
            ratio_to_float=medians[0] / median,
            ratio_to_quantized=medians[1] / median,
        )


def cases(parts: list[str]) -> Iterator[tuple[str, list[Contender]]]:
    """Cases one after another, so that only one holds memory."""
    if "lstm" in parts:
        for case, sizes in LSTM_CASES.items():
            yield case, list(lstm_contenders(*sizes))
    if "bag" in parts:
        for bits in (8, 4, 2):
            yield f"bag {bits}-bit", list(bag_contenders(bits))
    if "attention" in parts:
        for batch, length in ATTENTION_CASES:
            yield f"attention batch {batch} length {length}", list(attention_contenders(batch, length))


def main() -> None:
    """Prints the table and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", type=lambda s: s.split(","), default=["lstm", "bag", "attention"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for all contenders of one case")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    facts = {
        "cpu": cpu_name(),
        "level": hb.cpu_capability(),
        "threads": arguments.threads,
        "torch": str(torch.__version__),
        "halfbyte": hb.__version__,
        "command": shlex.join(["python", *sys.argv]),
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'ms':>8} {'best':>8} {'x float':>8} {'x torch quantized':>18}")
    rows = []
    for case, contenders in cases(arguments.parts):
        for row in measure(case, contenders, arguments.seconds):
            rows.append(row)
            print(
                f"{row.median_ms:8.3f} {row.best_ms:8.3f} {row.ratio_to_float:8.2f} {row.ratio_to_quantized:18.2f}  "
                f"{row.case}, {row.contender}"
            )
    if arguments.json:
        document = {"machine": facts, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
