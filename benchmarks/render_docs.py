"""Writes the measured tables and charts of the documentation from the JSON files in ``benchmarks/results``.

    python benchmarks/render_docs.py

A page says ``<!-- table: FILE SECTION KIND -->`` and ``<!-- end -->``; what lies between is replaced by the table and a line
with the machine and the command. So no figure in the documentation is typed by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import bench_gptq
import bench_gptq_accuracy
import bench_gptq_convolutions
import bench_language_model
import bench_outliers
import bench_sentence_encoder
import bench_sizing
import peer_tables
import qat_tables
import search_tables

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"(<!-- table: (\S+) (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[tuple[str, str], Callable[[dict[str, dict[str, object]]], str]] = {
    ("lm", "quality"): bench_language_model.quality_table,
    ("lm", "summary"): bench_language_model.summary_table,
    ("lm", "accuracy"): bench_gptq_accuracy.accuracy_table,
    ("lm", "text"): bench_language_model.text_list,
    ("lm", "speed"): bench_language_model.speed_table,
    ("lm", "layers"): bench_gptq.layers_table,
    ("lm", "convolutions"): bench_gptq_convolutions.convolutions_table,
    ("lm", "sizing"): bench_sizing.sizing_table,
    ("lm", "outliers"): bench_outliers.outliers_table,
    ("lm", "qat-language"): qat_tables.language_table,
    ("lm", "qat-images"): qat_tables.image_table,
    ("lm", "qat-steps"): qat_tables.step_table,
    ("encoder", "quality"): bench_sentence_encoder.quality_table,
    ("encoder", "speed"): bench_sentence_encoder.speed_table,
}


def linear_table(document: dict[str, list[dict[str, object]]]) -> str:
    """Milliseconds of each contender and its speed relative to PyTorch float32, by rows of the input."""
    rows = document["rows"]
    counts = sorted({int(str(row["rows"])) for row in rows})
    contenders = list(dict.fromkeys(str(row["contender"]) for row in rows))
    cells = {(row["contender"], row["rows"]): f"{row['median_ms']:.3f} ({row['ratio_to_fp32']:.1f}x)" for row in rows}
    lines = ["| ms (vs float32) | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in counts) + " |"]
    lines.append("|---|" + "---:|" * len(counts))
    lines += [f"| {name} | " + " | ".join(cells[name, n] for n in counts) + " |" for name in contenders]
    return "\n".join(lines)


def recurrent_table(document: dict[str, list[dict[str, object]]], part: str) -> str:
    """Milliseconds of each contender of the LSTM or bag cases, and how many times faster than PyTorch's quantized form."""
    rows = [row for row in document["rows"] if str(row["case"]).startswith(part)]
    lines = ["| case | contender | ms | vs float32 | vs PyTorch quantized |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row['case']} | {row['contender']} | {row['median_ms']:.3f} | {row['ratio_to_float']:.2f} | "
        f"{row['ratio_to_quantized']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def replacement(match: re.Match[str]) -> str:
    """The marker, the table and its origin."""
    file, section, kind = match[2], match[3], match[4]
    content = json.loads((REPOSITORY / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
    if file.startswith("peers_"):
        make = peer_tables.contest_table if kind == "contest" else peer_tables.time_table
        return f"{match[1]}\n{make(content['rows'], section)}\n\n{peer_tables.origin(content)}\n\n{match[5]}"
    if file == "linear.json":
        machine = content["machine"]
        counts = ",".join(str(n) for n in sorted({row["rows"] for row in content["rows"]}))
        origin = (
            f"{machine['cpu']}, {machine['level']}, {machine['threads']} threads, PyTorch {machine['torch']}; read bandwidth "
            f"{machine['limits']['read_gbs']:.0f} GB/s: `python benchmarks/bench_linear.py --threads {machine['threads']} "
            f"--shapes {section} --rows {counts} --json benchmarks/results/linear.json`"
        )
        return f"{match[1]}\n{linear_table(content)}\n\n{origin}\n\n{match[5]}"
    if file == "recurrent.json":
        machine = content["machine"]
        origin = (
            f"{machine['cpu']}, {machine['level']}, {machine['threads']} threads, PyTorch {machine['torch']}: "
            f"`{machine['command']}`"
        )
        return f"{match[1]}\n{recurrent_table(content, section)}\n\n{origin}\n\n{match[5]}"
    document = content[section]
    if file.startswith("search_"):
        table = search_tables.TABLES[kind](content)
    else:
        table = TABLES["encoder" if file.startswith("minilm") else "lm", kind](document["rows"])
    machine = document["environment"]
    origin = (
        f"{machine['cpu']}, {machine['capability']}, {machine['threads']} thread(s), PyTorch {machine['torch']}: "
        f"`{machine['command']}`"
    )
    return f"{match[1]}\n{table}\n\n{origin}\n\n{match[5]}"


def main() -> None:
    for file in sorted((REPOSITORY / "benchmarks" / "results").glob("peers_*.json")):
        peer_tables.draw_charts(json.loads(file.read_text(encoding="utf-8")), REPOSITORY / "docs" / "images")
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKER.sub(replacement, text), encoding="utf-8")


if __name__ == "__main__":
    main()
