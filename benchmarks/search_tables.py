"""The tables of the guide to mixed precision, from what ``bench_search.py`` wrote."""

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]


def between_table(document: Document) -> str:
    """KL of each way to choose, at the same bytes, between the uniform widths; and accuracy where it was measured."""
    names = ("depth rule", "trace ranking", "search")
    lines = [
        "| between | MB | depth rule | trace ranking | search | search beside the rule |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["accuracy"]["between"]:
        narrow, wide = (key.split()[0] for key in row["between"])
        cells = [_cell(row[name], row["budget"]) for name in names]
        change = row["search"]["kl"] / row["depth rule"]["kl"] - 1
        lines.append(f"| {narrow}, {wide} | {1e-6 * row['budget']:.3f} | {' | '.join(cells)} | {100 * change:+.0f} % |")
    return "\n".join(lines)


def uniform_table(document: Document) -> str:
    """KL of one width everywhere and of the search at its bytes."""
    lines = ["| bytes of | MB | one width | search | ratio |", "|---|---:|---:|---:|---:|"]
    for row in document["accuracy"]["at_uniform"]:
        uniform, found = (_cell(row[name], row["budget"]) for name in ("uniform", "search"))
        ratio = row["search"]["kl"] / row["uniform"]["kl"]
        lines.append(f"| {row['scheme'].split()[0]} | {1e-6 * row['budget']:.3f} | {uniform} | {found} | {ratio:.2f} |")
    return "\n".join(lines)


def latency_table(document: Document) -> str:
    """Predicted and measured milliseconds of the points of both fronts, from the quickest."""
    lines = ["| MB | KL | predicted ms | measured ms | error |", "|---:|---:|---:|---:|---:|"]
    for row in sorted(document["latency"]["points"], key=lambda row: row["measured"]):
        lines.append(
            f"| {1e-6 * row['bytes']:.3f} | {row['kl']:.1e} | {1e3 * row['predicted']:.2f} | {1e3 * row['measured']:.2f} | "
            f"{100 * row['error']:+.1f} % |"
        )
    return "\n".join(lines)


TABLES = {"between": between_table, "uniform": uniform_table, "latency": latency_table}


def _cell(row: Mapping[str, float], budget: float) -> str:
    accuracy = f", {100 * row['top1']:.1f} %" if "top1" in row else ""
    smaller = row["bytes"] / budget - 1
    note = f" ({100 * smaller:+.1f} % bytes)" if abs(smaller) > 0.01 else ""
    return f"{row['kl']:.2e}{accuracy}{note}"
