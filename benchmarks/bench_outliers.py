"""Planted outlier channels: what they cost integer activations and weights, and what transforms win back.

    python benchmarks/bench_outliers.py --model novels5M --json benchmarks/results/novels5M.json

Before every attention and feed-forward block, four channels of the norm are multiplied by `--factor` and the layers that read
them divided by it, so that the float model computes what it did. The four with the largest gains are taken, the worst case.
Prints a markdown table; the tied embedding and head keep the model's own values.
"""

import argparse
import copy
import time
from pathlib import Path

import torch

import halfbyte as hb
from models import llama, output, shared_data

SCHEMES = {
    "int8_dynamic": hb.int8_dynamic(),
    "W4A8 g32": hb.int4_int8_dynamic(group_size=32),
    "int4 g32": hb.int4_weight_only(group_size=32),
}
ALGORITHMS: dict[str, tuple[hb.algorithms.Transform | hb.algorithms.Rounding, ...]] = {
    "default": (),
    "SmoothQuant": (hb.SmoothQuant(),),
    "AWQ": (hb.AWQ(),),
    "GPTQ": (hb.GPTQ(),),
    "AWQ + GPTQ": (hb.AWQ(), hb.GPTQ()),
}


def measure(root: Path, name: str, factors: list[float], rows: int, wanted: list[str]) -> dict[str, dict[str, object]]:
    """Perplexity and KL of every scheme and algorithm at every factor."""
    text = llama.load_text(root, name, rows=rows, calibration_rows=24)
    float_model = llama.load_float(root, name)
    reference = llama.log_probs(float_model, text.evaluation)
    calibration = [row[None] for row in text.calibration]
    result: dict[str, dict[str, object]] = {}
    for factor in factors:
        planted = copy.deepcopy(float_model)
        llama.plant_outliers(planted, factor)
        for scheme_name, scheme in SCHEMES.items():
            for algorithm_name in wanted:
                algorithms = ALGORITHMS[algorithm_name]
                if algorithm_name == "SmoothQuant" and scheme.activation is None:
                    continue
                model = copy.deepcopy(planted)
                start = time.process_time()
                report = hb.quantize_(
                    model, scheme, data=calibration, algorithms=algorithms, progress=False, on_fallback="allow"
                )
                seconds = time.process_time() - start
                distance = llama.evaluate(model, text.evaluation, reference)
                done = [record for record in report.transforms if not record.reason]
                result[f"{scheme_name}, {algorithm_name}, x{factor:g}"] = {
                    "scheme": scheme_name,
                    "algorithms": algorithm_name,
                    "factor": factor,
                    "perplexity": distance.perplexity,
                    "perplexity_change": distance.perplexity_change,
                    "perplexity_change_ci": distance.perplexity_change_ci,
                    "kl": distance.kl,
                    "kl_ci": distance.kl_ci,
                    "places": len(done),
                    "largest_change": max((record.change or 0.0 for record in done), default=0.0),
                    "cpu_seconds": seconds,
                }
    return result


def outliers_table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown: a line for each scheme and algorithm, the factors side by side."""
    factors = sorted({float(str(row["factor"])) for row in rows.values()})
    lines: dict[tuple[str, str], dict[float, dict[str, object]]] = {}
    for row in rows.values():
        lines.setdefault((str(row["scheme"]), str(row["algorithms"])), {})[float(str(row["factor"]))] = row
    header = ["scheme", "algorithms"]
    for factor in factors:
        planted = "no outliers" if factor == 1 else f"x{factor:g}"
        header += [f"{planted}: perplexity, %", "KL, nats"]
    table = [
        [
            scheme,
            algorithms,
            *(
                cell
                for factor in factors
                for cell in (
                    f"{100 * float(str(cells[factor]['perplexity_change'])):+.2f}",
                    f"{float(str(cells[factor]['kl'])):.1e} ± {float(str(cells[factor]['kl_ci'])):.0e}",
                )
            ),
        ]
        for (scheme, algorithms), cells in lines.items()
    ]
    return output.markdown(header, table, left={0, 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=llama.MODELS, default="novels5M")
    parser.add_argument("--factor", nargs="+", type=float, default=[1.0, 30.0, 100.0])
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--rows", type=int, default=40, help="evaluation rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    root = shared_data()
    if root is None:
        parser.exit(0, "skipped: no shared data here; HALFBYTE_SHARED names the folder that holds data/\n")
    torch.set_num_threads(arguments.threads)
    rows = measure(root, arguments.model, arguments.factor, arguments.rows, arguments.algorithms)
    print(outliers_table(rows))
    if arguments.json is not None:
        output.merge_json(arguments.json, "outliers", rows)


if __name__ == "__main__":
    main()
