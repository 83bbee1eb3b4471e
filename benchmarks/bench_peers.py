"""Linear layers of this and of other libraries in one run: PyTorch, ONNX Runtime, OpenVINO, ggml and torchao.

    python benchmarks/bench_peers.py [--threads 2] [--full] [--python ggml=PATH] [--json FILE]

Each library runs in a process of its own with the same number of threads; they take turns, several rounds for every row.
Cold: calls rotate over copies of the packed weights that together are past twice the last-level cache; hot (with --full or
--hot): one copy, up to 16 tokens. Times include dynamic activation quantization. The result of every row is compared with
float64; one that is further off than its bits explain is left out of rankings. `limit` is the part of the machine's limit
that a row reaches: the least time for reading the weights once (bandwidth measured in the same run) or for the products
(peak of our level's product instruction), whichever is more, over its time. A library that is not installed is left out,
with the reason. A row during which other processes ran is marked as disturbed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import halfbyte as hb
from limits import limit_ms, measure_limits

HERE = Path(__file__).resolve().parent
LIBRARIES = ["halfbyte", "torch", "onnxruntime", "openvino", "ggml", "torchao"]
QUICK = {"4096x4096": [1, 16, 256], "3072x768": [1, 16, 256]}
FULL = {
    "4096x4096": [1, 4, 16, 64, 256, 1024],
    "3072x768": [1, 4, 16, 64, 256, 1024],
    "768x768": [1, 16, 256],
    "11008x4096": [1, 16, 256],
    "4096x11008": [1, 16, 256],
}
HOT_ROWS = 16
ROUNDS = 3
SLOWEST_MS = 400.0  # one call; a variant that is slower is not tried with more tokens
DISTURBED = 0.2  # of a turn in which some task had to wait for a CPU: others were running
# Relative errors that rounding Gaussian weights and activations explains, by bits of the weight.
TOLERANCE = {32: 1e-5, 16: 0.01, 8: 0.03, 4: 0.16, 2: 0.6, 1: 0.8}


@dataclass(slots=True)
class Row:
    """One contender on one layer; `limit` is the part of the machine's limit that it reaches."""

    library: str
    name: str
    scheme: str
    wbits: float
    act: str
    shape: str
    rows: int
    cold: bool
    ms: float
    error: float
    valid: bool
    limit: float | None
    disturbed: bool


class Library:
    """A worker process."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        environment = dict(os.environ)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        package = str(Path(hb.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
        command = [python, str(HERE / "peer_worker.py"), name, str(threads)]
        pipe = subprocess.PIPE
        # What a library warns about goes nowhere: failures come back as answers.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.name = name

    def missing(self) -> str | None:
        """Waits until the library is loaded; says why it is not."""
        reason = self.read().get("missing")
        return None if reason is None else str(reason)

    def read(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"missing": f"the process ended with code {self.process.wait()}"}

    def ask(self, do: str, **arguments: object) -> dict[str, object]:
        """Sends a command; returns the answer."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"failed": f"the process ended with code {self.process.wait()}"}
        return self.read()


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MB where Linux does not say."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1] in units), default=32 << 20)


def measure(
    libraries: list[Library],
    shape: str,
    row_counts: list[int],
    limits: dict[str, float],
    notes: dict[str, str],
    *,
    hot: bool,
    seconds: float,
) -> list[Row]:
    """All rows of one shape; what could not be measured goes to `notes`."""
    out_features, in_features = (int(size) for size in shape.split("x"))
    contenders = []
    for library in libraries:
        arguments = {"shape": [out_features, in_features], "rows": row_counts, "cold_bytes": 2 * cache_bytes()}
        for name, facts in library.ask("open", **arguments).items():
            if isinstance(facts, dict) and "error" not in facts:
                contenders.append((library, name, facts))
            else:
                notes[name] = str(facts["error"] if isinstance(facts, dict) else facts)
    rows = []
    for count, cold in [(m, cold) for m in row_counts for cold in (True, False) if cold or (hot and m <= HOT_ROWS)]:
        turns: dict[str, list[dict[str, object]]] = {}
        for _ in range(ROUNDS):
            for library, name, _facts in contenders:
                if name not in notes:
                    turn = library.ask("time", name=name, rows=count, cold=cold, seconds=seconds)
                    if "ms" in turn:
                        turns.setdefault(name, []).append(turn)
                    else:
                        notes[name] = str(turn.get("failed") or turn.get("missing"))
        for library, name, facts in contenders:
            if name not in turns:
                continue
            calm = [turn for turn in turns[name] if turn["waited"] < DISTURBED]
            ms = statistics.median(statistics.median(turn["ms"]) for turn in calm or turns[name])
            error = max(turn["error"] for turn in turns[name])
            weight_bytes = out_features * in_features * facts["wbits"] / 8
            operations = 2.0 * count * out_features * in_features
            least = limit_ms(
                limits,
                hb.cpu_capability(),
                weight_bytes=weight_bytes,
                operations=operations,
                integer=facts["act"] == "int8",
            )
            rows.append(
                Row(
                    library=library.name,
                    name=name,
                    scheme=facts["scheme"],
                    wbits=facts["wbits"],
                    act=facts["act"],
                    shape=shape,
                    rows=count,
                    cold=cold,
                    ms=round(ms, 5),
                    error=round(error, 6),
                    valid=error < TOLERANCE[2 ** int(math.log2(facts["wbits"]))],
                    limit=None if least is None or not cold or facts["act"] == "bf16" else round(least / ms, 4),
                    disturbed=not calm,
                )
            )
            if ms > SLOWEST_MS:
                notes[name] = f"{shape}: {ms:.0f} ms for {count} tokens; not tried with more"
    for library in libraries:
        library.ask("close")
    return rows


def machine(threads: int, limits: dict[str, float]) -> dict[str, object]:
    """Facts that make a result comparable."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "cache_mb": cache_bytes() >> 20,
        "threads": threads,
        "level": hb.cpu_capability(),
        "halfbyte": hb.__version__,
        "python": platform.python_version(),
        "limits": limits,
        "command": " ".join(["python", "benchmarks/bench_peers.py", *sys.argv[1:]]),
    }


def key(row: dict[str, object]) -> tuple[object, ...]:
    """What a row is of."""
    return row["shape"], row["rows"], not row["cold"], row["name"]


def merge(path: Path, document: dict[str, object], rows: list[Row]) -> None:
    """Writes the rows among those that the file has from the same machine and level; a calm row beats a disturbed one."""
    old = json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": []}
    machine = document["machine"]
    assert isinstance(machine, dict)
    if old["machine"].get("level") == machine["level"] and old["machine"].get("cpu") == machine["cpu"]:
        kept = {key(row): row for row in old["rows"]}
    else:
        kept = {}
    for row in map(asdict, rows):
        if not row["disturbed"] or kept.get(key(row), row)["disturbed"]:
            kept[key(row)] = row
    lines = ",\n".join(json.dumps(kept[k]) for k in sorted(kept))
    head = json.dumps(document, indent=1)[:-2]
    path.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')


def main() -> None:
    """Prints the rows, fastest first, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--libraries", type=lambda s: s.split(","), default=LIBRARIES)
    parser.add_argument("--full", action="store_true", help="five shapes, up to 1024 tokens; otherwise two, up to 256")
    parser.add_argument("--shapes", type=lambda s: s.split(","), help="some of the five, as out_features x in_features")
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], help="tokens")
    parser.add_argument("--hot", action="store_true", help="also one copy of each weight; --full includes it")
    parser.add_argument("--seconds", type=float, default=0.05, help="of one turn")
    parser.add_argument(
        "--python", action="append", default=[], help="LIBRARY=INTERPRETER, for one that lives elsewhere"
    )
    parser.add_argument("--json", type=Path, help="write the rows here; other rows in the file are kept")
    arguments = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in arguments.python)
    started = [Library(name, pythons.get(name, sys.executable), arguments.threads) for name in arguments.libraries]
    missing = {library.name: library.missing() for library in started}
    notes = {name: reason for name, reason in missing.items() if reason is not None}
    libraries = [library for library in started if library.name not in notes]
    limits = measure_limits(arguments.threads)
    facts = machine(arguments.threads, limits)
    print(facts)
    rows: list[Row] = []
    shapes = FULL if arguments.full else QUICK
    for shape in arguments.shapes or shapes:
        shape_notes: dict[str, str] = {}
        counts = arguments.rows or FULL.get(shape, [1, 16, 256])
        if not (arguments.rows or arguments.full):
            counts = QUICK.get(shape, counts)
        measured = measure(
            libraries,
            shape,
            counts,
            limits,
            shape_notes,
            hot=arguments.hot or arguments.full,
            seconds=arguments.seconds,
        )
        notes |= shape_notes
        rows += measured
        for row in sorted(measured, key=lambda r: (r.rows, not r.cold, r.ms)):
            print(
                f"{row.shape:>10} M={row.rows:<5}{'cold' if row.cold else 'hot':<5}{row.ms:9.3f} ms  limit "
                f"{'-' if row.limit is None else f'{row.limit:.0%}':>4}  error {row.error:.4f}  {row.name}, {row.scheme}"
                f"{'' if row.valid else '  WRONG'}{'  disturbed' if row.disturbed else ''}",
                flush=True,
            )
    for name, note in notes.items():
        print(f"left out: {name}: {note}")
    if arguments.json:
        merge(arguments.json, {"machine": facts, "left_out": notes}, rows)
    for library in libraries:
        library.process.stdin.close()


if __name__ == "__main__":
    main()
