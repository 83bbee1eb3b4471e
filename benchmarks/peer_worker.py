"""One library in a process of its own, so that thread pools of different libraries never meet; `bench_peers.py` starts it.

It reads one JSON command a line and answers with one line: `open` builds every variant for a weight, `time` runs one variant
for a while, `close` frees all.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from peer_libraries import LIBRARIES

CHECKED_ROWS = 2


def reason(error: BaseException) -> str:
    """The error in one short line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def waiting_seconds() -> float:
    """Seconds for which some task of the machine waited for a CPU so far; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/pressure/cpu").read_text().split("\n", 1)[0].rsplit("=", 1)[1]) * 1e-6
    except OSError:
        return 0.0


class Worker:
    """The variants of one library and the layers of the shape that is open."""

    def __init__(self, library: str, threads: int) -> None:
        self.variants = list(LIBRARIES[library](threads))
        self.layers: dict[str, Any] = {}

    def open(self, shape: list[int], rows: list[int], cold_bytes: int) -> dict[str, object]:
        """Builds all variants; says of each what it is, or why it is missing."""
        generator = np.random.default_rng(0)
        self.weight = generator.standard_normal(shape, dtype=np.float32)
        self.inputs = {m: generator.standard_normal((m, shape[1]), dtype=np.float32) for m in rows}
        answer = {}
        for variant in self.variants:
            weight_bytes = self.weight.size * variant.wbits / 8
            copies = max(2, math.ceil(cold_bytes / weight_bytes))
            row: dict[str, object] = {
                "scheme": variant.scheme,
                "wbits": variant.wbits,
                "act": variant.act,
                "copies": copies,
            }
            try:
                self.layers[variant.name] = variant.build(self.weight, copies)
            except Exception as error:
                row["error"] = reason(error)
            answer[variant.name] = row
        self.runs: tuple[str, int] | None = None
        return answer

    def time(self, name: str, rows: int, cold: bool, seconds: float) -> dict[str, object]:
        """Milliseconds of each call, the relative error of the result, and the part of the time that tasks waited for a CPU."""
        try:
            layer = self.layers[name]
            calls = layer.runs(self.inputs[rows])
            if not cold:
                calls = calls[:1]
            for call in calls[: 2 if cold else 3]:
                call()
            gc.disable()
            times: list[float] = []
            waited = waiting_seconds()
            begin = time.perf_counter()
            while len(times) < 3 or time.perf_counter() - begin < seconds:
                call = calls[len(times) % len(calls)]
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e3)
            waited = (waiting_seconds() - waited) / (time.perf_counter() - begin)
            gc.enable()
            # The first turn over the copies also builds what a library builds at its first call.
            times = times[len(calls) :] if cold and len(times) >= 2 * len(calls) else times[len(times) // 4 :]
            y = np.asarray(layer.output(), np.float64)[:CHECKED_ROWS]
            expected = self.inputs[rows][:CHECKED_ROWS].astype(np.float64) @ self.weight.T.astype(np.float64)
            error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
            return {"ms": [round(t, 5) for t in times[-200:]], "error": error, "waited": waited}
        except Exception as error:
            return {"failed": reason(error)}

    def close(self) -> dict[str, object]:
        """Frees the layers."""
        self.layers = {}
        gc.collect()
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    try:
        worker = Worker(sys.argv[1], int(sys.argv[2]))
        print(json.dumps({"ready": True}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"missing": reason(error)}), file=answers, flush=True)
        return
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
