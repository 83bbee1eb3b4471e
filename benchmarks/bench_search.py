"""Mixed precision at equal bytes: the search against uniform widths, a depth rule and HAWQ's trace ranking.

    python benchmarks/bench_search.py --model novels5M --json benchmarks/results/search_novels5M.json
    python benchmarks/bench_search.py --model novels5M --json benchmarks/results/search_novels5M.json --latency

Sensitivities are measured on calibration data; every allocation is then scored on evaluation data that the search never
saw. The depth rule is of llama.cpp's kind: the next width goes to the value and down projections (for convolutions: to the
layers themselves) of the outer layers first. `--check` also measures 20 random allocations against their prediction.
`--latency` compares predicted and measured milliseconds instead, which needs a quiet machine. `--cache` keeps all
measurements: an interrupted run goes on there.
"""

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr

import halfbyte as hb
from halfbyte.calibration import run_batch
from models import searched, shared_data
from models.output import environment

Choices = Mapping[str, str]


def depth_rule(table: hb.SensitivityTable, narrow: str, wide: str, budget: int) -> dict[str, str]:
    """`narrow` everywhere; `wide` in the rule's order for as long as the bytes allow."""
    names = [unit.name for unit in table.units]
    blocks = [int(found[0]) if (found := re.findall(r"\d+", name)) else -1 for name in names]
    count = max(blocks) + 1
    outer = {i for i in range(count) if i < max(count // 8, 1) or i >= count - max(count // 8, 1)}

    def rank(index: int) -> tuple[int, int]:
        favoured = re.search(r"v_proj|down_proj|conv", names[index]) is not None
        is_outer = blocks[index] in outer or blocks[index] < 0
        third = blocks[index] % 3 == 2
        order = [favoured and is_outer, favoured and third, favoured, is_outer, True].index(True)
        return order, index

    choices = dict.fromkeys(names, narrow)
    for index in sorted(range(len(names)), key=rank):
        wider = {**choices, names[index]: wide}
        if table.bytes_of(wider) <= budget:
            choices = wider
    return choices


def random_choices(table: hb.SensitivityTable, generator: random.Random) -> dict[str, str]:
    """Widths drawn around a random mean, so that the allocations differ in size too."""
    keys = list(table.schemes)
    centre = generator.uniform(0, len(keys) - 1)
    return {unit.name: keys[min(len(keys) - 1, max(0, round(generator.gauss(centre, 1.0))))] for unit in table.units}


@dataclass
class Scorer:
    """Bytes, KL to the float model and accuracy of allocations on data that the search never saw."""

    table: hb.SensitivityTable
    case: searched.Case
    kept: Path | None
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.float = self._log_probs({}).double()
        if self.kept is not None and self.kept.exists():
            for line in self.kept.read_text(encoding="utf-8").splitlines():
                self.known.update(json.loads(line))

    def __call__(self, choices: Choices) -> dict[str, float]:
        key = str(sorted(choices.items()))
        if key not in self.known:
            found = self._log_probs(choices)
            parts = zip(self.float.split(1024), found.split(1024), strict=True)
            kl = torch.cat([(p.exp() * (p - q.double())).sum(-1) for p, q in parts])
            row = {"bytes": self.table.bytes_of(choices), "kl": float(kl.mean())}
            row["kl_ci"] = 1.96 * float(kl.std()) / len(kl) ** 0.5
            if self.case.labels is not None:
                row["top1"] = float((found.argmax(-1) == self.case.labels).float().mean())
            self.known[key] = row
            if self.kept is not None:
                with self.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({key: row}) + "\n")
        return self.known[key]

    def _log_probs(self, choices: Choices) -> torch.Tensor:
        assert self.table.session is not None
        return self.case.log_probs(self.table.session.bench.apply(choices))


def measure(case: searched.Case, cache: Path | None, progress: bool) -> hb.SensitivityTable:
    return hb.measure_sensitivity(case.model, case.measuring, case.schemes, cache=cache, progress=progress)


def compare(
    case: searched.Case,
    table: hb.SensitivityTable,
    score: Scorer,
    parts: Sequence[float],
    cache: Path | None,
    plot: Path | None,
) -> dict[str, object]:
    """Every allocation between the uniform widths at equal bytes, at the bytes of each uniform width, and the front."""
    uniform = {key: score(dict.fromkeys(table.entries, key)) for key in table.schemes}
    keys = sorted(table.schemes, key=lambda key: uniform[key]["bytes"])
    start = time.perf_counter()
    trace = hb.measure_sensitivity(
        case.model, case.measuring[:4], case.schemes, method="trace", cache=cache, progress=False
    )
    seconds = {"trace": time.perf_counter() - start, "allocations": 0.0}
    between = []
    for (narrow, wide), part in itertools.product(itertools.pairwise(keys), parts):
        low, high = uniform[narrow]["bytes"], uniform[wide]["bytes"]
        rule = depth_rule(table, narrow, wide, int(low + part * (high - low)))
        budget = table.bytes_of(rule)
        start = time.perf_counter()
        found = table.allocate(max_bytes=budget)
        seconds["allocations"] += time.perf_counter() - start
        row = {
            "between": [narrow, wide],
            "budget": budget,
            "depth rule": score(rule),
            "trace ranking": score(trace.allocate(max_bytes=budget, corrections=0).choices),
            "search, no corrections": score(table.allocate(max_bytes=budget, corrections=0).choices),
            "search": {**score(found.choices), "measured": found.measured_loss, "predicted": found.predicted_loss},
            "choices": widths(found),
        }
        between.append(row)
        show(row)
    at_uniform = []
    for key in keys:
        budget = int(uniform[key]["bytes"])
        found = table.allocate(max_bytes=budget)
        row = {"budget": budget, "scheme": key, "uniform": uniform[key], "search": score(found.choices)}
        at_uniform.append({**row, "choices": widths(found)})
        show(row)
    front = table.pareto(points=16, measured=True)
    print(front)
    if plot is not None:
        front.plot(plot)
    return {
        "float": score({}),
        "uniform": uniform,
        "between": between,
        "at_uniform": at_uniform,
        "seconds": seconds,
        "front": [{"bytes": p.bytes, "kl": p.loss, "choices": widths(p)} for p in front.points],
    }


def widths(allocation: hb.Allocation) -> str:
    """The first word of the scheme of every unit, in order: int4 int8 float."""
    return " ".join(key.split()[0] for key in allocation.choices.values())


def show(row: Mapping[str, object]) -> None:
    """One line: KL, bytes relative to the budget, accuracy."""
    cells = [str(row["budget"])]
    for name, each in row.items():
        if isinstance(each, Mapping) and "kl" in each:
            accuracy = f" {100 * each['top1']:.1f} %" if "top1" in each else ""
            cells.append(f"{name}: {each['kl']:.3e} ({100 * (each['bytes'] / row['budget'] - 1):+.1f} %){accuracy}")
    print("  ".join(cells), flush=True)


def check(table: hb.SensitivityTable, score: Scorer) -> dict[str, object]:
    """Predicted loss of random allocations against their loss on the evaluation data."""
    generator = random.Random(0)
    pairs = []
    for _ in range(20):
        choices = random_choices(table, generator)
        pairs.append((table.predicted_loss(choices), score(choices)["kl"]))
    rank = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    print(f"Spearman of predicted and measured loss: {rank:.3f}")
    return {"pairs": pairs, "spearman": rank}


def latency(case: searched.Case, table: hb.SensitivityTable, seconds: float) -> dict[str, object]:
    """Predicted against measured time of whole models: every chosen point, in turn."""
    measured = table.measure_latency(case.timed, seconds=seconds, progress=False)
    session = table.session
    assert session is not None
    points = [*table.pareto("latency", points=8).points, *table.pareto("bytes", points=8).points]
    times: list[list[float]] = [[] for _ in points]
    stop = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < stop or len(times[-1]) < 5:
            for point, spent in zip(points, times, strict=True):
                model = session.bench.apply({k: v for k, v in point.choices.items() if v != "float"})
                run_batch(model, case.timed)
                start = time.perf_counter()
                run_batch(model, case.timed)
                spent.append(time.perf_counter() - start)
    rows = []
    for point, spent in zip(points, times, strict=True):
        assert point.latency is not None
        row = {"predicted": point.latency, "measured": median(spent), "bytes": point.bytes, "kl": point.loss}
        rows.append({**row, "error": row["predicted"] / row["measured"] - 1})
        print({key: f"{value:.4g}" for key, value in rows[-1].items()})
    print(f"largest error {max(abs(row['error']) for row in rows):.1%}, {len(rows)} points, {len(times[0])} rounds")
    return {"whole": dict(measured.whole), "rounds": measured.rounds, "threads": measured.threads, "points": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=searched.NAMES, default="novels5M")
    parser.add_argument("--data", type=Path, default=None, help="the folder with the real models and data")
    parser.add_argument("--json", type=Path, help="what is written there; other parts of it are kept")
    parser.add_argument("--check", action="store_true", help="predicted against measured loss of random allocations")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="only times, this long for each of two parts")
    parser.add_argument("--parts", default="0.33,0.67", help="where the budgets lie between two uniform widths")
    parser.add_argument("--cache", type=Path, help="keeps measurements; an interrupted run goes on there")
    parser.add_argument("--plot", type=Path, help="PNG of the front")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    case = searched.load(options.data or shared_data(), options.model)
    start = time.perf_counter()
    table = measure(case, options.cache, options.progress)
    seconds = time.perf_counter() - start
    result = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}

    def keep(part: str, found: Mapping[str, object]) -> None:
        result[part] = {"environment": environment(), **found}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if options.latency is not None:
        keep("latency", latency(case, table, options.latency))
        return
    print(f"{options.model}: {len(table.units)} units, {seconds:.0f} s\n{table}", flush=True)
    score = Scorer(table, case, options.cache and options.cache.with_suffix(".scores"))
    parts = [float(part) for part in options.parts.split(",")]
    keep(
        "accuracy",
        {
            "units": len(table.units),
            "measuring": seconds,
            **compare(case, table, score, parts, options.cache, options.plot),
        },
    )

    if options.check:
        keep("prediction", check(table, score))


if __name__ == "__main__":
    main()
