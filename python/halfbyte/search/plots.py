"""Plots of fronts and allocations. matplotlib is loaded when something is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.search.bench import FLOAT, short_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from halfbyte.search.allocation import Allocation
    from halfbyte.search.front import Front

_LOSSES = {"kl": "KL to float (nats)", "mse": "relative squared error"}


def plot_front(front: Front, path: str | Path | None, chosen: Allocation | None, axes: Axes | None) -> Axes:
    """See `Front.plot`."""
    largest = max(map(front.cost_of, (*front.points, *front.uniform.values())))
    scale, unit = (1e3, "ms") if front.cost == "latency" else (1e-6, "MB") if largest > 1e6 else (1e-3, "kB")
    uniform = {key: point for key, point in front.uniform.items() if key != FLOAT}

    def place(*points: Allocation) -> tuple[list[float], list[float]]:
        return [scale * front.cost_of(p) for p in points], [p.loss for p in points]

    with _drawing(path, axes, (7.0, 4.5)) as drawn:
        drawn.plot(*place(*(p for p in front.points if p.loss > 0)), "o-", color="tab:blue", label="searched", zorder=3)
        drawn.plot(*place(*uniform.values()), "s", color="tab:gray", label="one scheme everywhere")
        labels = short_labels(list(uniform))
        for key, point in uniform.items():
            (x,), (y,) = place(point)
            drawn.annotate(labels[key], (x, y), (4, 4), textcoords="offset points", fontsize=7)
        if FLOAT in front.uniform:
            x = scale * front.cost_of(front.uniform[FLOAT])
            drawn.axvline(x, color="tab:gray", linestyle=":", label="float (no loss)")
        if chosen is not None:
            drawn.plot(*place(chosen), "*", ms=15, color="tab:red", label="chosen", zorder=4)
        if any(p.loss > 0 for p in (*front.points, *uniform.values())):
            drawn.set_yscale("log")
        drawn.set_xlabel(f"{'size' if front.cost == 'bytes' else 'latency of one pass'} ({unit})")
        drawn.set_ylabel(_LOSSES.get(front.loss_name, front.loss_name))
        drawn.grid(alpha=0.3)
        drawn.legend()
    return drawn


def plot_bits(allocation: Allocation, path: str | Path | None, axes: Axes | None) -> Axes:
    """See `Allocation.plot`."""
    bits = [allocation.bits_of(unit) for unit in allocation.units]
    with _drawing(path, axes, (max(5.0, min(20.0, 1.5 + 0.18 * len(bits))), 4.0)) as drawn:
        shades = {width: f"C{index}" for index, width in enumerate(sorted(set(bits)))}
        drawn.bar(range(len(bits)), bits, color=[shades[b] for b in bits])
        drawn.set_yscale("log", base=2)
        drawn.set_yticks(sorted(set(bits)), [str(b) for b in sorted(set(bits))])
        drawn.set_ylim(1, 1.2 * max(bits))
        step = -(-len(bits) // 100)  # no more than a hundred names can be read
        names = [unit.name for unit in allocation.units][::step]
        drawn.set_xticks(range(0, len(bits), step), names, rotation=90, fontsize=6)
        drawn.set_xlim(-0.6, len(bits) - 0.4)
        drawn.set_ylabel("bits of a weight")
    return drawn


@contextmanager
def _drawing(path: str | Path | None, axes: Axes | None, size: tuple[float, float]) -> Iterator[Axes]:
    """The axes to draw into, new ones if None; written to `path` afterwards."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'halfbyte[plot]'") from error
    figure = None
    if axes is None:
        figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    if path is not None:
        axes.get_figure().savefig(path, dpi=110)  # type: ignore[union-attr]
        if figure is not None:
            plt.close(figure)
