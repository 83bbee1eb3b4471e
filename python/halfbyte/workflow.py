"""The verbs: `quantize_`, and its steps `prepare_`, `calibrate`, `convert_`.

A conversion first checks everything it can, then computes every layer's integers beside the untouched model, and only then
swaps modules: a call that fails or is interrupted leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.algorithms import HessianRounding, Rounding, default_rounding
from halfbyte.calibration import Data, Forward, InputStatistics, check_data, run_data
from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback, OnFallback, announce
from halfbyte.formats import FloatFormat, IntFormat
from halfbyte.hessian import InputHessian, hessian_bytes
from halfbyte.memory import MemorySize, conversion_budget
from halfbyte.nn import HalfEmbedding, HalfLinear, QuantizedEmbedding, QuantizedLinear
from halfbyte.nn.packed_weight import PANEL, WeightPacker, packed_bytes
from halfbyte.parts import ModelInParts
from halfbyte.plan import Plan, PlanRow, plan
from halfbyte.progress import track
from halfbyte.recipe import Recipe
from halfbyte.report import ModuleReport, Report
from halfbyte.schemes import Scheme
from halfbyte.sequential import round_in_order, section_bytes
from halfbyte.staging import Staging
from halfbyte.swap import in_parts, interrupts_deferred, put_parts_in_place, replace_module
from halfbyte.targets import disable_fast_paths

_CHUNK_ELEMENTS = 1 << 16  # weights rounded at a time: bounds the working set whatever the layer's size
_PREPARATION = "_halfbyte_preparation"


def quantize_(
    model: nn.Module,
    scheme_or_recipe: Scheme | Recipe | Plan,
    data: Data | None = None,
    algorithms: Sequence[Rounding] = (),
    progress: bool = True,
    max_memory: MemorySize | None = None,
    on_fallback: OnFallback = "warn",
    *,
    forward: Forward | None = None,
) -> Report:
    """Quantizes a model in place, in one call.

    Linear layers get the scheme. Embeddings, and output heads tied to them, are stored at 8 bits a weight at least, unless an
    override names them. Everything else stays in floating point; the report says why.

    Args:
        model: Any module with float32, bfloat16 or float16 weights on the CPU.
        scheme_or_recipe: A scheme for every layer, a `Recipe` with overrides, or a `Plan` made for this model.
        data: Batches of calibration data: tensors, tuples of positional or dicts of keyword arguments. Optional; with it,
            scale search weights errors by the mean square of the inputs.
        algorithms: How integers are chosen; default: min/max at 8 bits, `MSE()` below.
        progress: Show a progress bar on stderr.
        max_memory: Bytes (or "6GB") that the model and the work may take together; default: the model and twice its largest
            layer. Refused before any work if it cannot be kept.
        on_fallback: What to do where a module cannot be quantized exactly as asked: "raise" before any work, "warn", or
            "allow". The report lists every fallback.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.

    Returns:
        What happened: per-module error, bytes before and after, time, fallbacks.

    Raises:
        QuantizationError: nothing to quantize, quantized already, NaN or inf in a weight, bad data, a pattern that matches
            nothing. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> report.bytes_after < report.bytes_before / 3
        True
    """
    start = time.perf_counter()
    if is_prepared(model):
        raise QuantizationError("the model is prepared already; finish with hb.convert_(model)")
    preparation = _Preparation.of(model, scheme_or_recipe, algorithms, max_memory, on_fallback, in_order=True)
    if data is None and any(a.needs_data for a in preparation.algorithms):
        names = ", ".join(type(a).__name__ for a in preparation.algorithms if a.needs_data)
        raise QuantizationError(f"{names} needs calibration data: pass data=<iterable of batches>")
    with in_parts(model, preparation.plan.taken_apart):
        if data is not None and preparation.hessian_rounding is not None:
            return _convert(model, preparation, progress, start, batches=list(check_data(data)), forward=forward)
        if data is not None:
            with preparation.observing(model):
                preparation.batches += run_data(model, check_data(data), forward=forward, progress=progress)
        return _convert(model, preparation, progress, start)


def prepare_(
    model: nn.Module,
    recipe: Scheme | Recipe | Plan,
    algorithms: Sequence[Rounding] = (),
    *,
    max_memory: MemorySize | None = None,
    on_fallback: OnFallback = "warn",
) -> nn.Module:
    """First step of `quantize_`: checks everything and starts observing the inputs of the modules to be quantized.

    The model computes what it did before (recurrent and attention layers through their parts); run `calibrate` (or the model
    itself) on data, then `convert_`.

    Args:
        model, recipe, algorithms, max_memory, on_fallback: As in `quantize_`.

    Returns:
        The model.

    Raises:
        QuantizationError: as in `quantize_`, or the model is prepared already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = hb.prepare_(model, hb.int4_weight_only(32))
        >>> _ = hb.calibrate(model, [torch.randn(8, 64)], progress=False)
        >>> report = hb.convert_(model, progress=False)
    """
    if is_prepared(model):
        raise QuantizationError("the model is prepared already; finish with hb.convert_(model)")
    preparation = _Preparation.of(model, recipe, algorithms, max_memory, on_fallback)
    put_parts_in_place(model, preparation.plan.taken_apart)
    preparation.observe(model)
    model.__dict__[_PREPARATION] = preparation
    return model


def calibrate(model: nn.Module, data: Data, *, forward: Forward | None = None, progress: bool = True) -> nn.Module:
    """Second step of `quantize_`: runs batches through a prepared model, in evaluation mode without gradients.

    May be called several times; statistics add up.

    Args:
        model: A model that `prepare_` prepared.
        data, forward, progress: As in `quantize_`.

    Returns:
        The model.

    Raises:
        QuantizationError: the model is not prepared, there were no batches, or NaN among a module's inputs.
    """
    preparation = _prepared(model)
    preparation.batches += run_data(model, check_data(data), forward=forward, progress=progress)
    return model


def convert_(model: nn.Module, *, progress: bool = True) -> Report:
    """Last step of `quantize_`: replaces the prepared modules by quantized ones.

    Args:
        model: A model that `prepare_` prepared.
        progress: Show a progress bar on stderr.

    Returns:
        The report.

    Raises:
        QuantizationError: the model is not prepared, or an algorithm needs data and none was run.
    """
    start = time.perf_counter()
    preparation = _prepared(model)
    needing = [type(a).__name__ for a in preparation.algorithms if a.needs_data]
    if needing and not any(s.tokens for s in preparation.statistics.values()):
        raise QuantizationError(f"{', '.join(needing)} needs calibration data: run hb.calibrate(model, data) first")
    report = _convert(model, preparation, progress, start)
    preparation.stop_observing(model)
    del model.__dict__[_PREPARATION]
    return report


@dataclass(slots=True, kw_only=True)
class _Preparation:
    """A checked plan with its algorithms, and the statistics gathered so far."""

    plan: Plan
    algorithms: tuple[Rounding, ...]
    on_fallback: OnFallback
    staging_budget: int
    statistics: dict[str, InputStatistics]
    batches: int = 0

    @staticmethod
    def of(
        model: nn.Module,
        recipe: Scheme | Recipe | Plan,
        algorithms: Sequence[Rounding],
        max_memory: MemorySize | None,
        on_fallback: OnFallback,
        *,
        in_order: bool = False,
    ) -> _Preparation:
        """Resolves and checks everything that can be checked before work.

        With `in_order`, Hessians exist one layer at a time; otherwise those of all layers do until the model is converted.
        """
        announce((), on_fallback)
        chosen = _check_algorithms(algorithms)
        made = plan(model, recipe)
        modules = ModelInParts.of(model, made.taken_apart).modules
        inputs = [row for row in made.targets if _has_inputs(modules[row.name], made, row)]
        hessian = bool(chosen) and isinstance(chosen[-1], HessianRounding)
        calibration = _calibration_bytes(model, inputs, in_order=in_order) if hessian else 0
        staging_budget = conversion_budget(made, max_memory, calibration=calibration)
        made = Plan(rows=tuple(_check_weight(modules[row.name], row) for row in made.rows))
        announce(made.fallbacks, on_fallback)
        with_hessian = {row.name for row in inputs} if hessian else set()
        statistics = {
            row.name: InputHessian(row.name) if row.name in with_hessian else InputStatistics(row.name)
            for row in made.targets
            if _observed(modules[row.name], row)
        }
        return _Preparation(
            plan=made,
            algorithms=chosen,
            on_fallback=on_fallback,
            staging_budget=staging_budget,
            statistics=statistics,
        )

    def observe(self, model: nn.Module) -> None:
        """Hooks the statistics to their modules."""
        for name, statistics in self.statistics.items():
            model.get_submodule(name).register_forward_pre_hook(statistics)

    def stop_observing(self, model: nn.Module) -> None:
        """Takes the hooks away, those that a copy of the model brought along included."""
        ours = {id(statistics) for statistics in self.statistics.values()}
        for module in model.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if id(hook) in ours]:
                del hooks[key]

    def observing(self, model: nn.Module) -> _Observing:
        """Observes inside a `with` block."""
        return _Observing(self, model)

    def rounding_of(self, row: PlanRow) -> Rounding:
        """The algorithm that chooses the integers of a module."""
        assert row.scheme is not None and isinstance(row.scheme.weight, IntFormat)
        return self.algorithms[-1] if self.algorithms else default_rounding(row.scheme.weight)

    @property
    def hessian_rounding(self) -> HessianRounding | None:
        """The algorithm, if it needs Hessians."""
        last = self.algorithms[-1] if self.algorithms else None
        return last if isinstance(last, HessianRounding) else None

    def importance_of(self, row: PlanRow) -> Tensor | None:
        """Mean square of each input of a module, or None if nothing was run."""
        if row.name not in self.statistics or not any(s.tokens for s in self.statistics.values()):
            return None
        return self.statistics[row.name].mean_square


@dataclass(slots=True)
class _Observing:
    preparation: _Preparation
    model: nn.Module

    def __enter__(self) -> None:
        self.preparation.observe(self.model)

    def __exit__(self, *_: object) -> None:
        self.preparation.stop_observing(self.model)


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_` was called and `convert_` was not."""
    return hasattr(model, _PREPARATION)


def _prepared(model: nn.Module) -> _Preparation:
    preparation = getattr(model, _PREPARATION, None)
    if not isinstance(preparation, _Preparation):
        raise QuantizationError("the model is not prepared; call hb.prepare_(model, recipe) first, or use hb.quantize_")
    return preparation


def _check_algorithms(algorithms: Sequence[Rounding]) -> tuple[Rounding, ...]:
    if isinstance(algorithms, Rounding) or not isinstance(algorithms, Sequence):
        raise TypeError(f"algorithms={algorithms!r} is not a list; use algorithms=[hb.algorithms.MSE()]")
    for algorithm in algorithms:
        if isinstance(algorithm, type) or not isinstance(algorithm, Rounding):
            raise TypeError(f"{algorithm!r} is not an algorithm; use an instance such as hb.algorithms.MSE()")
    if len(algorithms) > 1:
        names = ", ".join(type(a).__name__ for a in algorithms)
        raise ValueError(f"algorithms=[{names}]: only one can choose the integers of a weight; name one")
    return tuple(algorithms)


def _observed(module: nn.Module, row: PlanRow) -> bool:
    integer = row.scheme is not None and isinstance(row.scheme.weight, IntFormat)
    return integer and isinstance(module, nn.Linear)


def _has_inputs(module: nn.Module, made: Plan, row: PlanRow) -> bool:
    """Whether all that is read of a module's weight are products with inputs: not a table, nor tied to one."""
    return _observed(module, row) and row.tied_to is None and all(row.name != other.tied_to for other in made.targets)


def _calibration_bytes(model: nn.Module, inputs: Sequence[PlanRow], *, in_order: bool) -> int:
    """What Hessians take: one at a time and a copy of a block where layers are calibrated in order, else all of them."""
    in_features = [row.shape[1] for row in inputs if row.shape is not None]
    if not in_features:
        return 0
    kept = section_bytes(model, [row.name for row in inputs]) if in_order else sum(4 * size**2 for size in in_features)
    return hessian_bytes(max(in_features)) + kept


def _check_weight(module: nn.Module, row: PlanRow) -> PlanRow:
    """Checks that a weight is on the CPU and finite, and that its scales fit their dtype; one pass over memory."""
    if row.scheme is None:
        return row
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.device.type != "cpu":
        hint = "load the weights first" if weight.is_meta else "move the model to the CPU: model.cpu()"
        raise QuantizationError(f"{row.name}: weight is on device {weight.device}; {hint}")
    weight_format = row.scheme.weight
    group_size = weight_format.group_size(weight.shape[1]) if isinstance(weight_format, IntFormat) else weight.shape[1]
    low, high = ops.observe_minmax(weight.detach(), group_size=group_size)
    for name, bad in (("NaN", torch.isnan(low).any()), ("inf", torch.isinf(low).any() or torch.isinf(high).any())):
        if bad:
            raise QuantizationError(
                f"{row.name}: weight has {name}; repair the checkpoint, or leave the module in float"
            )
    if isinstance(weight_format, FloatFormat):
        limit = torch.finfo(weight_format.dtype).max
        if max(high.max().item(), -low.min().item()) > limit:
            raise QuantizationError(
                f"{row.name}: weight has values past {limit:g}, the largest {weight_format}; use hb.bf16()"
            )
        return row
    if weight_format.scale_dtype != torch.float16:
        return row
    # The largest scale of each row, as min/max gives it: where even that is subnormal in float16, rounding would lose the row.
    span = torch.maximum(high, -low) if weight_format.symmetric else high.clamp(min=0) - low.clamp(max=0)
    largest = span.amax(dim=1) / max(weight_format.qmax, 1)
    limits = torch.finfo(torch.float16)
    if largest.max().item() <= limits.max and not bool(((largest > 0) & (largest < limits.tiny)).any()):
        return row
    message = (
        f"scales between {largest.min().item():.1e} and {largest.max().item():.1e} do not fit float16: float32 is used"
    )
    scheme = replace(row.scheme, weight=replace(weight_format, scale_dtype=torch.float32))
    assert row.shape is not None
    added = packed_bytes(scheme.weight, row.layout, row.shape) - packed_bytes(weight_format, row.layout, row.shape)  # type: ignore[arg-type]
    fallback = Fallback(row.name, "scale_dtype", message)
    after = row.bytes_after if row.tied_to else row.bytes_after + added
    return replace(row, scheme=scheme, bytes_after=after, fallbacks=(*row.fallbacks, fallback))


@dataclass(frozen=True, slots=True)
class _Rounded:
    """What is known of a module's weight once its integers exist."""

    relative_error: float
    seconds: float
    rounding: str
    fallbacks: tuple[Fallback, ...] = ()


def _convert(
    model: nn.Module,
    preparation: _Preparation,
    progress: bool,
    start: float,
    *,
    batches: Sequence[object] = (),
    forward: Forward | None = None,
) -> Report:
    """Rounds all weights and swaps all modules; with `batches`, layers that need Hessians are calibrated in order first."""
    made = preparation.plan
    with Staging(preparation.staging_budget) as staging:
        results: dict[str, _Rounded] = {}
        with torch.no_grad():
            if batches:
                results = _round_in_order(model, preparation, staging, batches, forward, progress)
            rows = [row for row in made.targets if row.tied_to is None and row.name not in results]
            for row in track(rows, "quantizing", enabled=progress):
                results[row.name] = _round_weight(model, row, preparation, staging)
        announce((f for result in results.values() for f in result.fallbacks), preparation.on_fallback)
        _commit(model, made, staging)
    modules = tuple(_module_report(row, results) for row in made.rows)
    return Report(
        modules=modules,
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        seconds=time.perf_counter() - start,
        calibration_batches=preparation.batches,
    )


def _module_report(row: PlanRow, results: dict[str, _Rounded]) -> ModuleReport:
    if row.scheme is None:
        return ModuleReport(plan=row, fallbacks=row.fallbacks)
    result = results[row.tied_to or row.name]
    return ModuleReport(
        plan=row,
        rounding=result.rounding,
        relative_error=result.relative_error,
        seconds=0.0 if row.tied_to else result.seconds,
        fallbacks=row.fallbacks + (() if row.tied_to else result.fallbacks),
    )


def _round_weight(model: nn.Module, row: PlanRow, preparation: _Preparation, staging: Staging) -> _Rounded:
    """Chooses the integers of one weight, some rows at a time, and stages them."""
    start = time.perf_counter()
    weight = model.get_submodule(row.name).weight
    assert row.scheme is not None and isinstance(weight, Tensor)
    weight_format = row.scheme.weight
    error = norm = 0.0
    statistics = preparation.statistics.get(row.name)
    if isinstance(statistics, InputHessian):
        return _round_layer(row, weight, statistics, preparation, staging)[0]
    if isinstance(weight_format, FloatFormat):  # cast when it is swapped in: it costs no search
        for rows in _row_chunks(weight):
            error += (rows.float() - rows.to(weight_format.dtype).float()).square().sum(dtype=torch.float64).item()
            norm += rows.float().square().sum(dtype=torch.float64).item()
    else:
        rounding, importance = preparation.rounding_of(row), preparation.importance_of(row)
        group_size = weight_format.group_size(weight.shape[1])
        packer = WeightPacker(weight_format, row.layout, (weight.shape[0], weight.shape[1]))
        for rows in _row_chunks(weight):
            part = rounding.round(rows, weight_format, importance)
            packer.add(part)
            error += (part.dequantize(group_size) - rows).square_().sum(dtype=torch.float64).item()
            norm += rows.float().square().sum(dtype=torch.float64).item()
        staging.put(row.name, packer.packed())
    relative_error = (error / norm) ** 0.5 if norm > 0 else 0.0
    name = "cast" if isinstance(weight_format, FloatFormat) else type(rounding).__name__
    return _Rounded(relative_error, time.perf_counter() - start, name)


def _round_layer(
    row: PlanRow, weight: Tensor, inputs: InputHessian, preparation: _Preparation, staging: Staging
) -> tuple[_Rounded, Tensor]:
    """Chooses the integers of one weight from the Hessian of its inputs and stages them; also gives the new weight."""
    start = time.perf_counter()
    rounding = preparation.hessian_rounding
    assert rounding is not None and row.scheme is not None and isinstance(row.scheme.weight, IntFormat)
    weight_format = row.scheme.weight
    layer = rounding.round_layer(row.name, weight.detach(), weight_format, inputs)
    rounded = layer.codes.dequantize(weight_format.group_size(weight.shape[1]))
    packer = WeightPacker(weight_format, row.layout, (weight.shape[0], weight.shape[1]))
    packer.add(layer.codes)
    staging.put(row.name, packer.packed())
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    error = torch.linalg.vector_norm(rounded - weight.detach(), dtype=torch.float64).item()
    seconds = time.perf_counter() - start
    return _Rounded(error / norm if norm > 0 else 0.0, seconds, type(rounding).__name__, layer.fallbacks), rounded


def _round_in_order(
    model: nn.Module,
    preparation: _Preparation,
    staging: Staging,
    batches: Sequence[object],
    forward: Forward | None,
    progress: bool,
) -> dict[str, _Rounded]:
    rows = {row.name: row for row in preparation.plan.targets}
    results: dict[str, _Rounded] = {}

    def round_layer(name: str, layer: nn.Linear, inputs: InputHessian) -> Tensor:
        results[name], rounded = _round_layer(rows[name], layer.weight, inputs, preparation, staging)
        return rounded

    names = [name for name, statistics in preparation.statistics.items() if isinstance(statistics, InputHessian)]
    round_in_order(model, names, batches, round_layer, forward=forward, progress=progress)
    preparation.batches += len(batches)
    return results


def _row_chunks(weight: Tensor) -> Iterator[Tensor]:
    rows = max(PANEL, _CHUNK_ELEMENTS // weight.shape[1] // PANEL * PANEL)
    return iter(torch.split(weight.detach(), rows))


def _commit(model: nn.Module, made: Plan, staging: Staging) -> None:
    """Swaps all modules. An interrupt waits until the last one is in: half a conversion would be no model at all."""
    swapped: dict[str, nn.Module] = {}
    with interrupts_deferred():
        for row in sorted(made.targets, key=lambda r: r.tied_to is not None):  # owners of a shared weight first
            new = _converted(model.get_submodule(row.name), row, swapped, staging)
            replace_module(model, (row.name, *row.aliases), new)
            swapped[row.name] = new
        disable_fast_paths(model)


def _converted(old: nn.Module, row: PlanRow, swapped: dict[str, nn.Module], staging: Staging) -> nn.Module:
    scheme, home = row.scheme, None if row.tied_to is None else swapped[row.tied_to]
    assert scheme is not None and isinstance(old, nn.Linear | nn.Embedding)
    new: nn.Module
    if isinstance(scheme.weight, FloatFormat):
        if isinstance(home, HalfLinear | HalfEmbedding):
            weight = home.weight
        else:
            weight = nn.Parameter(old.weight.detach().to(scheme.weight.dtype), requires_grad=old.weight.requires_grad)
        if isinstance(old, nn.Linear):
            new = HalfLinear(scheme, weight, old.bias)
        else:
            new = HalfEmbedding(scheme, weight, old.weight.dtype, old.padding_idx)
    else:
        packed = home.packed_weight if isinstance(home, QuantizedLinear | QuantizedEmbedding) else staging.get(row.name)
        if isinstance(old, nn.Linear):
            new = QuantizedLinear(scheme, packed, old.bias, old.weight.dtype)
        else:
            new = QuantizedEmbedding(scheme, packed, old.weight.dtype, old.padding_idx)
    return new
