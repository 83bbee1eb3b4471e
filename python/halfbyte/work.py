"""What a quantization will take: peak memory from shapes, time from shapes and rates measured here in a second or two.

The times assume that layers of one parent with as many inputs read the same tensor (as q, k and v do), that every block runs
once for each such input and once at the end, and that a rate found on a small layer holds for a large one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte import ops
from halfbyte.algorithms import HessianRounding, Rounding, default_rounding
from halfbyte.flow import find_blocks, module_bytes
from halfbyte.formats import CodebookFormat, FloatFormat, IntFormat, PackedFormat, PerGroup
from halfbyte.hessian import InputHessian, hessian_bytes
from halfbyte.memory import needed_bytes
from halfbyte.plan import Plan, PlanRow, Work
from halfbyte.preparation import calibration_bytes

_SIZE = 1024  # of the layer that rates are measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds of one unit of work on this machine, with the threads that torch has.

    Attributes:
        product: A multiplication and addition of a matrix product, in the dtype of the model.
        hessian: One of `N * I^2` in a Hessian; `drift` in a drift.
        solve: One of `O * I^2` in choosing the integers of a layer from its Hessian, the factor included.
        search: One weight in choosing integers without a Hessian.
    """

    product: float
    hessian: float
    drift: float
    solve: float
    search: float


def measure_rates(rounding: Rounding, weight_format: PackedFormat, dtype: torch.dtype = torch.float32) -> Rates:
    """Runs each kind of work a few times on a small layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * _SIZE, _SIZE, generator=generator)
    weight = torch.randn(_SIZE, _SIZE, generator=generator)
    tiles, cross = ops.hessian_tiles(_SIZE), torch.zeros(_SIZE, _SIZE, dtype=torch.float64)
    given, matrix = x.to(dtype), weight.to(dtype)
    product = _seconds(lambda: nn.functional.linear(given, matrix)) / (2 * _SIZE**3)
    hessian = _seconds(lambda: ops.hessian_update_(tiles, x)) / (2 * _SIZE**3)
    drift = _seconds(lambda: ops.cross_hessian_update_(cross, x, x)) / (2 * _SIZE**3)
    if isinstance(rounding, HessianRounding):
        inputs = InputHessian("sample")
        inputs.update(x)
        if rounding.needs_drift:
            inputs.update_drift(x, x * 1.001)
        solve = _seconds(lambda: _solve(rounding, weight, weight_format, inputs)) / _SIZE**3
        return Rates(product=product, hessian=hessian, drift=drift, solve=solve, search=0.0)
    search = _seconds(lambda: rounding.round(weight[:64], weight_format, None)) / (64 * _SIZE)
    return Rates(product=product, hessian=hessian, drift=drift, solve=0.0, search=search)


def _solve(rounding: HessianRounding, weight: torch.Tensor, weight_format: PackedFormat, inputs: InputHessian) -> None:
    inputs.forget_factor()
    rounding.round_layer("sample", weight, weight_format, inputs)


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs, so that what else the machine does counts as little as can be."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def predict(model: nn.Module, made: Plan, algorithms: Sequence[object], tokens: int) -> Work:
    """The work of `quantize_(model, made, data=<tokens>, algorithms=algorithms)`.

    Raises:
        ValueError: no tokens.
    """
    if tokens < 0:
        raise ValueError(f"tokens={tokens} is negative; give the number of tokens of calibration data, 0 for none")
    targets = [row for row in made.targets if row.tied_to is None and row.shape is not None]
    packed = [row for row in targets if row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)]
    if not packed:
        return Work(tokens=tokens, peak_bytes=needed_bytes(made), streamed_peak_bytes=None, hidden_bytes=0, seconds={})
    formats = [row.scheme.weight for row in packed if row.scheme is not None]
    weight_format = next(f for f in formats if not isinstance(f, FloatFormat))
    last = algorithms[-1] if algorithms else None
    rounding = last if isinstance(last, Rounding) else default_rounding(weight_format)
    rates = measure_rates(rounding, _fitting(weight_format), next(model.parameters()).dtype)
    linear = [row for row in packed if not isinstance(model.get_submodule(row.name), nn.Embedding)]
    blocks = find_blocks(model, [row.name for row in linear])
    if not isinstance(rounding, HessianRounding):
        seconds = {"search": rates.search * sum(_numel(row) for row in packed)}
        return Work(
            tokens=tokens,
            peak_bytes=needed_bytes(made),
            streamed_peak_bytes=_streamed(model, made, blocks, 1, 0, hessian=False),
            hidden_bytes=0,
            seconds=seconds,
        )
    twice = 2 if rounding.needs_drift else 1
    shared = {(row.name.rpartition(".")[0], row.shape[1]) for row in linear if row.shape is not None}
    per_block = max(1, len(shared) // max(1, len(blocks)))
    runs = twice * (per_block / 2 + 1)  # a run ends where the input is seen: half way, on average
    squares = sum(width**2 for _, width in shared)
    seconds = {
        "running the model": rates.product * tokens * runs * sum(_numel(row) for row in linear),
        "Hessians": (rates.hessian + (rates.drift if rounding.needs_drift else 0.0)) * tokens * squares,
        "choosing integers": rates.solve * sum(_numel(row) * row.shape[1] for row in linear if row.shape is not None),
    }
    calibration = calibration_bytes(model, linear, in_order=True, drift=rounding.needs_drift)
    widest = max(row.shape[1] for row in linear if row.shape is not None)
    work_bytes = hessian_bytes(widest, drift=rounding.needs_drift)
    width = min(row.shape[1] for row in linear if row.shape is not None)
    return Work(
        tokens=tokens,
        peak_bytes=needed_bytes(made, calibration=calibration, hessian=True),
        streamed_peak_bytes=_streamed(model, made, blocks, twice, work_bytes, hessian=True),
        hidden_bytes=4 * tokens * width * twice if blocks else 0,
        seconds=seconds,
    )


def _streamed(
    model: nn.Module, made: Plan, blocks: Sequence[str], copies: int, calibration: int, *, hessian: bool
) -> int | None:
    """Memory of `quantize_checkpoint`: what lies outside the blocks, copies of one, and the work."""
    if not blocks:
        return None
    sizes = [module_bytes(model.get_submodule(block)) for block in blocks]
    resident = module_bytes(model) - sum(sizes) + copies * max(sizes)
    return needed_bytes(made, calibration=calibration, resident=resident, hessian=hessian)


def _numel(row: PlanRow) -> int:
    assert row.shape is not None
    return row.shape[0] * row.shape[1]


def _fitting(weight_format: PackedFormat) -> PackedFormat:
    """The format with groups that divide the sample."""
    grouped = isinstance(weight_format.granularity, PerGroup)
    if not grouped or not isinstance(weight_format, IntFormat | CodebookFormat):
        return weight_format
    size = weight_format.group_size(_SIZE) if _divides(weight_format) else 128
    return weight_format.with_granularity(PerGroup(size))


def _divides(weight_format: PackedFormat) -> bool:
    granularity = weight_format.granularity
    return isinstance(granularity, PerGroup) and _SIZE % granularity.group_size == 0
