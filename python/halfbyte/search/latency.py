"""How long each candidate takes on this CPU, timed where it runs: inside the model, on the user's own input.

The model runs with every scheme in turn, again and again, while hooks take the time of each unit. What a unit takes thus
includes the state in which its surroundings leave the caches. Modules of one type, weight shape and scheme are one kernel
and share their median. The sum is checked against the time of the whole model without hooks, and scaled to it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from halfbyte.calibration import Forward, evaluating, run_batch
from halfbyte.confidence import margin_of_median
from halfbyte.progress import track
from halfbyte.search.bench import FLOAT, Workbench

_WARMUP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of one forward pass.

    Attributes:
        units: Unit name to candidate key to seconds.
        rest: What the model takes outside the units.
        whole: Candidate key to the measured seconds of the whole model with that scheme everywhere.
        scale: Candidate key to what the times of its units were multiplied by to add up to that: 1 but for what a scheme
            changes between the units, such as the memory format that the next operation finds.
        threads: Threads that torch used.
        rounds: Times each was measured.
        margin: Half width of the 95 % confidence interval of the whole model's time, relative, the widest of all schemes.
    """

    units: Mapping[str, Mapping[str, float]] = field(repr=False)
    rest: float
    whole: Mapping[str, float]
    scale: Mapping[str, float]
    threads: int
    rounds: int
    margin: float

    def of(self, choices: Mapping[str, str]) -> float:
        """Predicted seconds of a configuration."""
        return self.rest + sum(times[choices.get(name, FLOAT)] for name, times in self.units.items())

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "units": {name: dict(times) for name, times in self.units.items()},
            "rest": self.rest,
            "whole": dict(self.whole),
            "scale": dict(self.scale),
            "threads": self.threads,
            "rounds": self.rounds,
            "margin": self.margin,
        }


def measure_latency(
    bench: Workbench,
    batch: object,
    *,
    forward: Forward | None = None,
    seconds: float = 20.0,
    precision: float = 0.02,
    progress: bool = True,
) -> Latency:
    """Times all candidates.

    Args:
        bench: The model with its candidates.
        batch: The input whose latency counts.
        forward: As in `quantize_`.
        seconds: Time to spend at most; every scheme runs five times at least.
        precision: Stops when the confidence interval of every scheme's whole-model time is narrower than this part of it.
        progress: Show a progress bar on stderr.
    """
    run = run_batch if forward is None else forward
    keys = [
        FLOAT,
        *dict.fromkeys(key for candidates in bench.candidates.values() for key in candidates if key != FLOAT),
    ]
    everywhere = {
        key: {name: key for name, candidates in bench.candidates.items() if key in candidates} for key in keys
    }
    clock = _Clock(bench)
    whole: dict[str, list[float]] = {key: [] for key in keys}
    inner: dict[str, dict[str, list[float]]] = {key: {unit.name: [] for unit in bench.units} for key in keys}
    deadline = time.perf_counter() + seconds

    def timed(model: nn.Module) -> float:
        start = time.perf_counter()
        run(model, batch)
        return time.perf_counter() - start

    rounds = 0
    try:
        with evaluating(bench.model):
            for _ in track(range(10_000), "timing", enabled=progress):
                for key in keys:
                    model = bench.apply(everywhere[key])
                    for _ in range(_WARMUP if rounds == 0 else 1):  # the switch left the caches to other weights
                        run(model, batch)
                    whole[key].append(timed(model))
                    with clock:
                        run(model, batch)
                    for name, spent in clock.spent.items():
                        inner[key][name].append(spent)
                rounds += 1
                if rounds >= 5 and (time.perf_counter() > deadline or _widest(whole) < precision):
                    break
    finally:
        bench.apply({})
    units = _pooled(bench, inner)
    middle = {key: median(times) for key, times in whole.items()}
    rest = max(middle[FLOAT] - sum(row[FLOAT] for row in units.values()), 0.0)
    scale = {key: _fit(units, key, middle[key] - rest) for key in keys}
    return Latency(
        units=units,
        rest=rest,
        whole=middle,
        scale=scale,
        threads=torch.get_num_threads(),
        rounds=rounds,
        margin=_widest(whole),
    )


class _Clock:
    """Sums the time spent in each unit while its `with` block runs the model."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.spent: dict[str, float] = {}

    def __enter__(self) -> None:
        self.spent = {unit.name: 0.0 for unit in self._bench.units}
        for unit in self._bench.units:
            for name in unit.modules:
                self._watch(unit.name, self._bench.model.get_submodule(name))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, unit: str, module: nn.Module) -> None:
        started: list[float] = []

        def before(module: nn.Module, args: object) -> None:
            started.append(time.perf_counter())

        def after(module: nn.Module, args: object, output: object) -> None:
            self.spent[unit] += time.perf_counter() - started.pop()

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, prepend=True)]


def _pooled(bench: Workbench, inner: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median seconds of each unit and candidate, over all units that run the same kernels."""
    kernels = {unit.name: _kernel_of(bench, unit.name) for unit in bench.units}
    units: dict[str, dict[str, float]] = {unit.name: {} for unit in bench.units}
    for key, times in inner.items():
        pool: dict[object, list[float]] = {}
        for name, spent in times.items():
            pool.setdefault(kernels[name], []).extend(spent)
        for name in units:
            if key in bench.candidates[name]:
                units[name][key] = median(pool[kernels[name]])
    return units


def _fit(units: dict[str, dict[str, float]], key: str, wanted: float) -> float:
    """Scales the times of a scheme so that all units in it, or in float where it does not apply, take `wanted` seconds."""
    having = [row for row in units.values() if key in row]
    fixed = sum(row[FLOAT] for row in units.values() if key not in row)
    scale = (wanted - fixed) / sum(row[key] for row in having)
    if scale <= 0:
        return 1.0
    for row in having:
        row[key] *= scale
    return scale


def _kernel_of(bench: Workbench, unit: str) -> object:
    modules = bench.candidates[unit][FLOAT].modules.values()
    return tuple(
        (type(module).__name__, module.extra_repr(), tuple(tuple(p.shape) for p in module.parameters()))
        for module in modules
    )


def _widest(times: Mapping[str, Sequence[float]]) -> float:
    """The widest 95 % confidence interval of a median, relative."""
    return max(margin_of_median(values) / median(values) for values in times.values())
