"""Mixed precision at equal bytes: the search against uniform widths, a depth rule and HAWQ's trace ranking.

    python benchmarks/bench_search.py --model novels5M --json benchmarks/results/search_novels5M.json

Sensitivities are measured on calibration data; every allocation is then scored on evaluation data that the search never
saw. The depth rule is of llama.cpp's kind: the next width goes to the value and down projections (for convolutions: to the
layers themselves) of the outer layers first. `--check` also measures 20 random allocations against their prediction.
"""

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr

import halfbyte as hb
from halfbyte.search.bench import FLOAT
from halfbyte.search.losses import summarize
from models import searched, shared_data


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


def run(model_name: str, root: Path, *, check: bool, latency: bool, cache: Path | None) -> dict[str, object]:
    case = searched.load(root, model_name)
    start = time.perf_counter()
    table = hb.measure_sensitivity(
        case.model, case.measuring, case.schemes, calibration=case.calibration, forward=case.forward, cache=cache
    )
    seconds = time.perf_counter() - start
    session = table.session
    assert session is not None
    meter = session.meter.on(session.bench.apply({}), case.evaluation)

    def score(choices: Mapping[str, str]) -> dict[str, object]:
        model = session.bench.apply(choices)
        found = summarize(meter.values(model))
        return {"bytes": table.bytes_of(choices), "kl": found.loss, "kl_ci": found.margin, **case.quality(model)}

    result: dict[str, object] = {"model": model_name, "units": len(table.units), "seconds": {"measure": seconds}}
    uniform = {key: score(dict.fromkeys(table.entries, key)) for key in table.schemes}
    result["float"], result["uniform"] = score({}), uniform
    print(table)

    trace = hb.measure_sensitivity(
        case.model,
        case.measuring[:4],
        case.schemes,
        method="trace",
        calibration=case.calibration,
        forward=case.forward,
    )
    rows: list[dict[str, object]] = []
    keys = sorted(table.schemes, key=lambda key: uniform[key]["bytes"])  # type: ignore[arg-type, return-value]
    for narrow, wide in itertools.pairwise(keys):
        low, high = uniform[narrow]["bytes"], uniform[wide]["bytes"]
        for part in (0.33, 0.67):
            rule = depth_rule(table, narrow, wide, int(low + part * (high - low)))  # type: ignore[operator]
            budget = table.bytes_of(rule)
            begin = time.perf_counter()
            plain = table.allocate(max_bytes=budget, corrections=0)
            solved = time.perf_counter()
            found = table.allocate(max_bytes=budget)
            row = {
                "between": [narrow, wide],
                "budget": budget,
                "solver_seconds": solved - begin,
                "correction_seconds": time.perf_counter() - solved,
                "depth rule": score(rule),
                "trace ranking": score(trace.allocate(max_bytes=budget, corrections=0).choices),
                "search, solver only": score(plain.choices),
                "search": {**score(found.choices), "predicted": found.predicted_loss, "choices": dict(found.choices)},
            }
            rows.append(row)
            shown = {k: row[k]["kl"] for k in ("depth rule", "trace ranking", "search, solver only", "search")}  # type: ignore[index]
            print(budget, {k: f"{v:.3e}" for k, v in shown.items()}, flush=True)
    result["equal_bytes"] = rows
    at_uniform = []
    for key in keys:
        found = table.allocate(max_bytes=uniform[key]["bytes"])  # type: ignore[arg-type]
        at_uniform.append({"scheme": key, "uniform": uniform[key], "search": score(found.choices)})
        print(key, f"{uniform[key]['kl']:.3e}", f"{at_uniform[-1]['search']['kl']:.3e}", flush=True)  # type: ignore[index]
    result["at_uniform_bytes"] = at_uniform
    front = table.pareto(points=16)
    result["front"] = front.to_dict()
    print(front)
    if check:
        generator = random.Random(0)
        pairs = []
        for _ in range(20):
            choices = random_choices(table, generator)
            pairs.append((table.predicted_loss(choices), score(choices)["kl"]))
        result["prediction"] = {"pairs": pairs, "spearman": spearmanr(*zip(*pairs, strict=True)).statistic}
        print("spearman of predicted and measured loss:", result["prediction"]["spearman"])  # type: ignore[index]
    if latency:
        result["latency"] = latency_check(table, case.timed)
    return result


def latency_check(table: hb.SensitivityTable, batch: object) -> dict[str, object]:
    """Predicted against measured time of whole models, float and every chosen point alternating."""
    measured = table.measure_latency(batch, seconds=40, progress=False)
    session = table.session
    assert session is not None
    points = table.pareto("latency", points=8).points
    times: list[list[float]] = [[] for _ in points]
    run_one = session.meter._run
    for _ in range(15):
        for index, point in enumerate(points):
            model = session.bench.apply({k: v for k, v in point.choices.items() if v != FLOAT})
            with torch.no_grad():
                run_one(model, batch)
                begin = time.perf_counter()
                run_one(model, batch)
                times[index].append(time.perf_counter() - begin)
    rows = [
        {"predicted": point.latency, "measured": sorted(each)[len(each) // 2], "bytes": point.bytes, "kl": point.loss}
        for point, each in zip(points, times, strict=True)
    ]
    for row in rows:
        print({k: f"{v:.4g}" for k, v in row.items()})
    return {"whole": measured.to_dict()["whole"], "rounds": measured.rounds, "points": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=searched.NAMES, default="novels5M")
    parser.add_argument("--data", type=Path, default=None, help="the folder with the real models and data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="predicted against measured loss of random allocations")
    parser.add_argument("--latency", action="store_true", help="predicted against measured latency; on a quiet machine")
    parser.add_argument("--cache", type=Path, help="keeps measurements; an interrupted run goes on there")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = run(
        options.model, options.data or shared_data(), check=options.check, latency=options.latency, cache=options.cache
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
