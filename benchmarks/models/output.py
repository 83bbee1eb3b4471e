"""Machine description, timing and markdown tables for the benchmarks with real models."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
import transformers

import halfbyte as hb

__all__ = ["alternate", "environment", "markdown", "merge_json"]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    here = Path(__file__).resolve().parent
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def environment() -> dict[str, str | int]:
    """What a figure depends on: CPU, ISA level in use, threads, versions, commit and the command itself."""
    return {
        "cpu": _cpu_name(),
        "capability": str(hb.cpu_capability()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "halfbyte": hb.__version__,
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def alternate(functions: Sequence[Callable[[], object]], *, repeats: int) -> list[float]:
    """Median seconds of each function, called in turn `repeats` times after one warm-up.

    Taking turns exposes all of them to the same neighbours and clock changes. With one thread the clock is the process's own
    CPU time, which does not count the time that other processes had the core.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for index, function in enumerate(functions):
            start = clock()
            function()
            seconds[index].append(clock() - start)
    return [statistics.median(samples) for samples in seconds]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A markdown table with aligned columns: those in `left` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = (
        "|"
        + "|".join(
            "-" * (width + 2) if column in left else "-" * (width + 1) + ":" for column, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([line(header), rule, *map(line, rows)])


def merge_json(path: Path, section: str, rows: Mapping[str, Mapping[str, object]]) -> None:
    """Writes `rows` (by scheme) into `section` of a JSON file, keeping what other runs put beside it."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part = document.setdefault(section, {"rows": {}})
    part["environment"] = environment()
    for name, row in rows.items():
        part["rows"].setdefault(name, {}).update(row)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
