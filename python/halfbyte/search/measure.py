"""`hb.measure_sensitivity`: what each scheme costs at each place, measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from halfbyte.algorithms import MSE, Rounding
from halfbyte.calibration import Data, Forward, check_data
from halfbyte.errors import QuantizationError
from halfbyte.progress import track
from halfbyte.schemes import Scheme
from halfbyte.search.bench import FLOAT, Choices, Workbench, build_workbench
from halfbyte.search.cache import MeasurementCache, content_hash, describe_callable
from halfbyte.search.losses import Loss, LossMeter, Measurement
from halfbyte.search.proxies import proxy_scores
from halfbyte.search.session import Session
from halfbyte.search.table import SensitivityTable
from halfbyte.search.units import Entry, Unit, find_units

Method = Literal["measure", "fisher", "trace", "output_error"]
Around = Literal["both", "float", "quantized"]


class SensitivityWarning(UserWarning):
    """Measurements that do not carry what will be concluded from them."""


def measure_sensitivity(
    model: nn.Module,
    data: Data,
    schemes: Sequence[Scheme],
    *,
    loss: Loss = "kl",
    method: Method = "measure",
    around: Around = "both",
    groups: Sequence[Sequence[str]] = (),
    algorithms: Sequence[Rounding] = (),
    calibration: Data | None = None,
    forward: Forward | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> SensitivityTable:
    """Measures how much the model loses where one module, or tied group, gets one of several schemes.

    Every scheme is applied to every module, by the same code as `quantize_`; then modules are switched in and out of the
    model and the loss of its outputs is measured. The model itself is not changed.

    Memory: the model, every module in every scheme, and for the built-in losses the float outputs on the data.

    Args:
        model: Any float module that `quantize_` accepts.
        data: Batches to measure on: a few thousand tokens or a few hundred images tell widths apart.
        schemes: Two or more schemes to choose from; floating point can be chosen too.
        loss: "kl" (mean divergence of the output distribution, nats), "mse" (relative squared error of the outputs), or
            `loss(model, batch)` that returns a number, smaller for better.
        method: "measure", or a proxy that needs one pass: "fisher", "trace" (HAWQ-V2), "output_error". A proxy orders
            modules; what it predicts is scaled to the measured loss of the uniform configurations.
        around: Where the rest of the model is while one module is switched: in "float"; "quantized" with the middle scheme,
            whose errors change what another one costs; or the mean of "both".
        groups: Modules that must get one scheme: `[("*.q_proj", "*.k_proj", "*.v_proj")]` ties those below one parent.
        algorithms: How integers are chosen, as in `quantize_`: roundings, no transforms. Default: `MSE()` at every width.
        calibration: Batches for those algorithms and for static ranges; default: `data`.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.
        cache: A file that keeps every measurement under a hash of weights, data and settings: an interrupted search goes on
            there, a second one is free. Of a callable loss and of `forward`, name and code count: when what they refer to
            changes, such as labels, name another file.
        progress: Show progress bars on stderr.

    Returns:
        The table, with `allocate` and `pareto`.

    Raises:
        QuantizationError: nothing to quantize, a scheme that applies nowhere, a loss that is not finite, no data.
        ValueError: fewer than two different schemes, unknown options.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> schemes = [hb.int_weight_only(bits, group_size=32) for bits in (8, 4, 2)]
        >>> table = hb.measure_sensitivity(model, [torch.randn(256, 64)], schemes, progress=False)
        >>> recipe = table.allocate(max_bytes=3000)
        >>> report = hb.quantize_(model, recipe, progress=False)
        >>> report.bytes_after <= 3000
        True
    """
    by_key = _check_schemes(schemes)
    if method not in ("measure", "fisher", "trace", "output_error"):
        raise ValueError(f"method={method!r} is unknown; use 'measure', 'fisher', 'trace' or 'output_error'")
    if around not in ("both", "float", "quantized"):
        raise ValueError(f"around={around!r} is unknown; use 'both', 'float' or 'quantized'")
    if len(by_key) < 2:
        raise ValueError("one scheme leaves nothing to choose; give two or more, such as 8, 4 and 3 bits")
    batches = list(check_data(data))
    if not batches:
        raise QuantizationError("data gave no batches; if it is a generator, it was used up before: make a new one")
    chosen: Sequence[Rounding] = tuple(algorithms) or (MSE(),)
    units = find_units(model, next(iter(by_key.values())), groups)
    calibrating = batches if calibration is None else list(check_data(calibration))
    needs_data = any(algorithm.needs_data for algorithm in chosen) or any(s.static for s in by_key.values())
    bench = build_workbench(
        model,
        units,
        by_key,
        data=calibrating if needs_data or calibration is not None else None,
        forward=forward,
        algorithms=chosen,
        progress=progress,
    )
    meter = LossMeter(bench.apply({}), batches, loss, forward)
    settings: dict[str, object] = {
        "schemes": [s.to_dict() for s in by_key.values()],
        "algorithms": [repr(a) for a in chosen],
        "loss": loss if isinstance(loss, str) else describe_callable(loss),
        "forward": None if forward is None else describe_callable(forward),
        "calibration": None if calibration is None else content_hash(nn.Module(), calibrating, {}),
    }
    subject = content_hash(model, batches, settings) if cache is not None else ""
    traced = method == "measure" and loss == "kl"
    session = Session(bench, meter, MeasurementCache(cache, subject), batches, forward, traced=traced)
    keys = list(by_key)
    uniform = {key: _everywhere(bench, key) for key in keys}
    uniform_losses = {key: session.measure(choices).loss for key, choices in _tracked(uniform, progress)}
    if method == "measure":
        scores, margins = _measured(session, uniform, around, progress)
    else:
        scores = proxy_scores(bench, batches, method, forward=forward, progress=progress)
        margins = {unit: dict.fromkeys(row, 0.0) for unit, row in scores.items()}
    table = SensitivityTable(
        units=units,
        schemes=by_key,
        entries={
            unit.name: {
                key: Entry(loss=scores[unit.name][key], margin=margins[unit.name][key], bytes=candidate.bytes)
                for key, candidate in bench.candidates[unit.name].items()
            }
            for unit in units
        },
        rest_bytes=bench.rest_bytes,
        uniform_losses=uniform_losses,
        loss_name=loss if isinstance(loss, str) else getattr(loss, "__name__", "loss"),
        method=method,
        session=session,
    )
    _warn_if_indistinct(table)
    return table


def _check_schemes(schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    if isinstance(schemes, Scheme) or not isinstance(schemes, Sequence):
        raise TypeError(
            f"schemes={schemes!r} is not a list; use schemes=[hb.int8_weight_only(), hb.int4_weight_only(32)]"
        )
    by_key: dict[str, Scheme] = {}
    for scheme in schemes:
        if scheme is None:
            continue  # floating point is always a candidate
        if not isinstance(scheme, Scheme):
            raise TypeError(f"{scheme!r} is not a scheme; call the function: hb.int8_weight_only()")
        by_key[str(scheme)] = scheme
    return by_key


def _everywhere(bench: Workbench, key: str) -> dict[str, str]:
    return {name: key for name, candidates in bench.candidates.items() if key in candidates}


def _tracked(uniform: dict[str, dict[str, str]], progress: bool) -> Iterator[tuple[str, dict[str, str]]]:
    return track(uniform.items(), "measuring uniform schemes", total=len(uniform), enabled=progress)


def _measured(
    session: Session, uniform: dict[str, dict[str, str]], around: Around, progress: bool
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Loss that each candidate adds, and its margin.

    Around the float model a(u, s) is measured for every unit u and scheme s; divergences from float are small and precise
    there. Around the model quantized with the middle scheme m, only b(u, m) is: what quantizing u adds to it. The ratio
    r(u) = b(u, m) / a(u, m) says how much more, or less, the unit weighs among errors of the others, and scales a(u, s).
    Where b is lost in noise, the ratio of all units together stands in.
    """
    bench = session.bench
    order = sorted(uniform, key=lambda key: bench.bytes_of(uniform[key]))
    middle = uniform[order[len(order) // 2]]
    jobs: list[tuple[dict[str, str], Unit, str]] = [
        ({}, unit, key) for unit in bench.units for key in bench.candidates[unit.name] if key != FLOAT
    ]
    if around != "float":
        jobs += [(middle, unit, FLOAT) for unit in bench.units if unit.name in middle]
    found: dict[tuple[bool, str, str], Measurement] = {}
    for start, unit, key in track(jobs, "measuring", total=len(jobs), enabled=progress):
        found[not start, unit.name, key] = session.measure(_with(start, unit, key), start)
    factors = dict.fromkeys((unit.name for unit in bench.units), 1.0)
    if around != "float":
        whole = session.measure(middle).loss
        alone = {name: found[True, name, key].loss for name, key in middle.items()}
        among = {name: whole - found[False, name, FLOAT].loss for name in middle}
        noise = {name: found[False, name, FLOAT].margin for name in middle}
        overall = max(sum(among.values()), 0.0) / max(sum(alone.values()), 1e-30)
        for name in middle:
            ratio = (among[name] + noise[name] * overall) / max(alone[name] + noise[name], 1e-30)
            ratio = min(max(ratio, overall / 4), overall * 4)
            factors[name] = ratio if around == "quantized" else (1 + ratio) / 2
    scores: dict[str, dict[str, float]] = {}
    margins: dict[str, dict[str, float]] = {}
    for unit in bench.units:
        row = {key: found[True, unit.name, key] for key in bench.candidates[unit.name] if key != FLOAT}
        scores[unit.name] = {FLOAT: 0.0, **{key: factors[unit.name] * m.loss for key, m in row.items()}}
        margins[unit.name] = {FLOAT: 0.0, **{key: factors[unit.name] * m.margin for key, m in row.items()}}
    return scores, margins


def _with(start: Choices, unit: Unit, key: str) -> dict[str, str]:
    choices = {name: each for name, each in start.items() if name != unit.name}
    if key != FLOAT:
        choices[unit.name] = key
    return choices


def _warn_if_indistinct(table: SensitivityTable) -> None:
    """Warns where noise hides the differences between the schemes of most modules."""
    if table.method != "measure":
        return
    hidden = [name for name, row in table.entries.items() if not table.tells_apart(name)]
    if 2 * len(hidden) > len(table.entries):
        message = (
            f"the data are too few to tell the schemes apart at {len(hidden)} of {len(table.entries)} modules "
            f"(such as {hidden[0]}): give more data, or schemes that differ more"
        )
        table.warnings.append(message)
        warnings.warn(message, SensitivityWarning, stacklevel=3)
