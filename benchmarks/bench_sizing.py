"""What quantizing a 70 B model takes here, from rates measured here; and how such a prediction does on a model that is run.

    python benchmarks/bench_sizing.py --json benchmarks/results/sizing.json

The architecture is Llama 3's with 70 B parameters, on the meta device: no weights are needed. novels5M is quantized for
real, at 4 bits with GPTQ, on 48 windows of 256 tokens.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import halfbyte as hb
from halfbyte.plan import Work
from models import llama, output, shared_data

CONFIG = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
ALGORITHMS = {
    "RTN": hb.algorithms.RTN(),
    "MSE": hb.MSE(),
    "GPTQ": hb.GPTQ(),
    "GPTQ, error_feedback=0": hb.GPTQ(error_feedback=0.0),
    "GPTQ, error_feedback=0, polish=0": hb.GPTQ(error_feedback=0.0, polish=0),
}


def row(plan: hb.Plan, work: Work) -> dict[str, object]:
    return {**work.to_dict(), "bytes_after": plan.bytes_after, "total_seconds": work.total_seconds}


def large(tokens: int) -> dict[str, dict[str, object]]:
    """Predictions for the large model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    rows: dict[str, dict[str, object]] = {}
    for name, algorithm in ALGORITHMS.items():
        count = tokens if name.startswith("GPTQ") else 0
        plan = hb.plan(model, hb.int4_weight_only(128), algorithms=[algorithm], tokens=count)
        assert plan.work is not None
        rows[f"70 B, {name}"] = row(plan, plan.work)
    return rows


def small(root: Path) -> dict[str, dict[str, object]]:
    """Predicted and measured on novels5M."""
    model = llama.load_float(root, "novels5M")
    text = llama.load_text(root, "novels5M", rows=1, calibration_rows=48)
    batches = list(torch.stack([window[:256] for window in text.calibration]).split(8))
    rows: dict[str, dict[str, object]] = {}
    algorithm = hb.GPTQ()
    plan = hb.plan(model, hb.int4_weight_only(64), algorithms=[algorithm], tokens=sum(b.numel() for b in batches))
    assert plan.work is not None
    start = time.perf_counter()
    hb.quantize_(model, plan, data=batches, algorithms=[algorithm], progress=False)
    rows["novels5M, GPTQ"] = {**row(plan, plan.work), "measured_seconds": time.perf_counter() - start}
    return rows


def sizing_table(rows: dict[str, dict[str, object]]) -> str:
    """As docs/sizing.md shows it."""
    cells = []
    for name, values in rows.items():
        streamed, total = float(str(values["streamed_peak_bytes"])), float(str(values["total_seconds"]))
        measured = values.get("measured_seconds")
        cells.append(
            [
                name,
                str(values["tokens"]),
                f"{float(str(values['bytes_after'])) / 1e9:.3g}",
                f"{float(str(values['peak_bytes'])) / 1e9:.3g}",
                f"{streamed / 1e9:.3g}",
                f"{float(str(values['hidden_bytes'])) / 1e9:.3g}",
                f"{total:.3g} s" if total < 3600 else f"{total / 3600:.1f} h",
                "" if measured is None else f"{float(str(measured)):.3g} s",
            ]
        )
    header = [
        "model, algorithm",
        "tokens",
        "file, GB",
        "memory, GB",
        "from files, GB",
        "hidden states, GB",
        "time",
        "measured",
    ]
    return output.markdown(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = large(arguments.tokens)
    print(sizing_table(rows), flush=True)
    root = shared_data()
    if root is not None:
        rows |= small(root)
        print(sizing_table(rows))
    if arguments.json is not None:
        output.merge_json(arguments.json, "sizing", rows)


if __name__ == "__main__":
    main()
