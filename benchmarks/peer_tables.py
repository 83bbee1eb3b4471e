"""Tables and charts of the documentation from the rows of `bench_peers.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Machine = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contest:
    """Rows that do the same job: ours, and those of the peers that it is held against."""

    title: str
    ours: str
    peer: Callable[[Row], bool]


def integer(bits: int) -> Callable[[Row], bool]:
    """Rows with `bits`-bit weights and INT8 activations."""
    return lambda row: row["act"] == "int8" and bits <= row["wbits"] < bits + 1


CONTESTS = {
    "int8": Contest("INT8 weights and activations", "halfbyte int8_dynamic", integer(8)),
    "w4a8": Contest("4-bit weights, INT8 activations", "halfbyte int4_int8_dynamic", integer(4)),
    "w2a8": Contest("2-bit weights, INT8 activations", "halfbyte int2_int8_dynamic", integer(2)),
    "w4": Contest(
        "4-bit weights, float activations",
        "halfbyte int4_weight_only",
        lambda row: row["act"] != "int8" and row["wbits"] == 4,
    ),
    "float": Contest("4-bit weights against float32", "halfbyte int4_weight_only", lambda row: row["wbits"] == 32),
}


def layer(shape: str) -> str:
    """`4096x4096` as prose writes it."""
    return shape.replace("x", " \N{MULTIPLICATION SIGN} ")


def cells(rows: list[Row], contest: Contest, *, cold: bool = True) -> dict[tuple[str, int], tuple[Row, Row]]:
    """Ours and the fastest valid peer, by shape and tokens."""
    rows = [row for row in rows if row["cold"] == cold and row["valid"]]
    result = {}
    for ours in (row for row in rows if row["name"] == contest.ours):
        same = [row for row in rows if (row["shape"], row["rows"]) == (ours["shape"], ours["rows"])]
        peers = [row for row in same if row["library"] != "halfbyte" and contest.peer(row)]
        if peers:
            result[ours["shape"], ours["rows"]] = (ours, min(peers, key=lambda row: row["ms"]))
    return result


def contest_table(rows: list[Row], name: str) -> str:
    """Our speed relative to the fastest peer, and which one that is; bold where it is ahead of us."""
    table = cells(rows, CONTESTS[name])
    tokens = sorted({m for _, m in table})
    lines = ["| speed against the fastest peer | " + " | ".join(f"{m} token{'s' * (m > 1)}" for m in tokens) + " |"]
    lines.append("|---|" + "---:|" * len(tokens))
    for shape in dict.fromkeys(shape for shape, _ in table):
        texts = []
        for m in tokens:
            if (shape, m) not in table:
                texts.append("")
                continue
            ours, peer = table[shape, m]
            ratio = f"{peer['ms'] / ours['ms']:.2f}x"
            mark = "*" if ours["disturbed"] or peer["disturbed"] else ""
            texts.append(f"{f'**{ratio}**' if peer['ms'] < ours['ms'] else ratio}{mark} {peer['name']}")
        lines.append(f"| {layer(shape)} | " + " | ".join(texts) + " |")
    ratios = [peer["ms"] / ours["ms"] for ours, peer in table.values()]
    mean = statistics.geometric_mean(ratios)
    behind = sum(ratio < 1 for ratio in ratios)
    return "\n".join(lines) + f"\n\nGeometric mean {mean:.2f}x; behind in {behind} of {len(ratios)}."


def time_table(rows: list[Row], shape: str) -> str:
    """Milliseconds of every contender on one shape, by tokens; in brackets the part of the machine's limit."""
    rows = [row for row in rows if row["shape"] == shape and row["cold"]]
    tokens = sorted({row["rows"] for row in rows})
    found = {(row["name"], row["rows"]): row for row in rows}
    lines = ["| ms (part of the limit) | " + " | ".join(f"{m} token{'s' * (m > 1)}" for m in tokens) + " |"]
    lines.append("|---|" + "---:|" * len(tokens))
    for name in sorted({row["name"] for row in rows}, key=lambda n: (not n.startswith("halfbyte"), n.lower())):
        texts = []
        for m in tokens:
            row = found.get((name, m))
            part = "" if row is None or row["limit"] is None else f" ({row['limit']:.0%})"
            texts.append("" if row is None else f"{row['ms']:.3f}{part}{'*' * row['disturbed']}")
        scheme = next(row["scheme"] for row in rows if row["name"] == name)
        lines.append(f"| {name}, {scheme} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def origin(document: dict[str, Any]) -> str:
    """The line under a table: machine, limits, command, and who is missing."""
    machine = document["machine"]
    limits = ", ".join(f"{name} {value:.0f}" for name, value in machine["limits"].items())
    return (
        f"{machine['cpu']}, {machine['level']}, {machine['threads']} threads, cache {machine['cache_mb']} MB; limits in GB/s "
        f"and 1e9 operations/s: {limits}. `{machine['command']}`"
    )


def draw_charts(document: dict[str, Any], folder: Path) -> None:
    """Writes `peers_LEVEL.svg`, speed by token count, and `limits_LEVEL.svg`, the part of the machine's limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "halfbyte", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    rows, level = document["rows"], document["machine"]["level"]
    names = ["int8", "w4a8", "w4", "float"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(11, 3), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        for shape in dict.fromkeys(row["shape"] for row in rows):
            points = sorted(
                (m, peer["ms"] / ours["ms"])
                for (s, m), (ours, peer) in cells(rows, CONTESTS[name]).items()
                if s == shape
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=layer(shape))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=CONTESTS[name].title, xlabel="tokens")
        label_tokens(axis, rows)
    axes[0].set_ylabel("speed against the fastest peer")
    axes[0].set_yticks([0.5, 1, 2, 4], ["0.5x", "1x", "2x", "4x"])
    axes[0].minorticks_off()
    axes[-1].legend(frameon=False)
    save(figure, folder / f"peers_{level}.svg")

    names = ["int8", "w4a8", "w4"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(11, 3), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, names, strict=True):
        for i, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
            table = {m: pair for (s, m), pair in cells(rows, CONTESTS[name]).items() if s == shape}
            tokens = sorted(table)
            for side, style in ((0, "-"), (1, ":")):
                points = [(m, 100 * table[m][side]["limit"]) for m in tokens if table[m][side]["limit"] is not None]
                who = ("halfbyte", "fastest peer")[side]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{layer(shape)}, {who}")
        axis.set(xscale="log", ylim=(0, 110), title=CONTESTS[name].title, xlabel="tokens")
        label_tokens(axis, rows)
    axes[0].set_ylabel("% of the machine's limit")
    axes[-1].legend(frameon=False, fontsize=7)
    save(figure, folder / f"limits_{level}.svg")


def label_tokens(axis: Any, rows: list[Row]) -> None:
    """One tick for each token count, and no others."""
    tokens = sorted({row["rows"] for row in rows})
    axis.set_xticks(tokens, [str(m) for m in tokens])
    axis.minorticks_off()
    axis.grid(axis="y", linewidth=0.3)


def save(figure: Any, path: Path) -> None:
    """Without a date, so that the same rows give the same file."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
