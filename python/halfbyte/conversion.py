"""Rounding every layer of a prepared model beside it, then swapping all modules at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from halfbyte.algorithms import HessianRounding, RoundedLayer
from halfbyte.algorithms.evening import evened_out
from halfbyte.building import quantized_module
from halfbyte.calibration import Forward
from halfbyte.convolution import ConvModule
from halfbyte.fallback import Fallback, announce
from halfbyte.formats import FloatFormat, IntFormat, PackedFormat, PerTensor
from halfbyte.hessian import InputHessian
from halfbyte.io.journal import Journal
from halfbyte.nn import HalfConv, HalfEmbedding, HalfLinear, QuantizedModule
from halfbyte.nn.packed_weight import PANEL, PackedWeight, WeightCodes, WeightPacker
from halfbyte.plan import Plan, PlanRow
from halfbyte.preparation import Preparation
from halfbyte.processes import Processes
from halfbyte.progress import track
from halfbyte.report import ModuleReport, Report
from halfbyte.section import Resources
from halfbyte.sequential import round_in_order
from halfbyte.staging import Staging, WeightStore, packed_weight
from halfbyte.swap import interrupts_deferred, replace_module
from halfbyte.targets import disable_fast_paths, weight_matrix

_CHUNK_ELEMENTS = 1 << 16  # weights rounded at a time: bounds the working set whatever the layer's size

Activations: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""`act_scale` and `act_zero_point` by name of the layer."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """What is known of a module's weight once its integers exist."""

    relative_error: float
    seconds: float
    rounding: str
    fallbacks: tuple[Fallback, ...] = ()
    shift: Tensor | None = None  # [O] float64: what the error adds to each output on average

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description, without `shift`."""
        return {
            "relative_error": self.relative_error,
            "seconds": self.seconds,
            "rounding": self.rounding,
            "fallbacks": [f.to_dict() for f in self.fallbacks],
        }

    @staticmethod
    def from_dict(fields: Mapping[str, object], shift: Tensor | None) -> Rounded:
        """What `to_dict` described."""
        return Rounded(
            relative_error=cast("float", fields["relative_error"]),
            seconds=cast("float", fields["seconds"]),
            rounding=cast("str", fields["rounding"]),
            fallbacks=tuple(Fallback(**f) for f in cast("list[dict[str, str]]", fields["fallbacks"])),  # type: ignore[arg-type]
            shift=shift,
        )


def convert(
    model: nn.Module,
    preparation: Preparation,
    progress: bool,
    start: float,
    *,
    batches: Sequence[object] = (),
    forward: Forward | None = None,
    resources: Resources | None = None,
) -> Report:
    """Rounds all weights and swaps all modules; with `batches`, layers that need Hessians are calibrated in order first."""
    made = preparation.plan
    activations = {name: hook.qparams() for name, hook in preparation.ranges.items()}
    with Staging(preparation.budget.staging) as staging:
        results: dict[str, Rounded] = {}
        with torch.no_grad():
            if batches:
                results = _round_in_order(
                    model, preparation, staging, batches, forward, progress, resources or Resources()
                )
            rows = [row for row in made.targets if row.tied_to is None and row.name not in results]
            for row in track(rows, "quantizing", enabled=progress):
                weight = weight_matrix(model.get_submodule(row.name))
                results[row.name] = round_weight(weight, row, preparation, staging)
        announce((f for result in results.values() for f in result.fallbacks), preparation.on_fallback)
        biases = {name: _corrected_bias(model, name, result) for name, result in results.items()}
        commit(model, made, staging, activations, biases)
    return report_of(preparation, results, start)


def report_of(preparation: Preparation, results: Mapping[str, Rounded], start: float) -> Report:
    """The report of a conversion that began at `start`."""
    made = preparation.plan
    return Report(
        modules=tuple(_module_report(row, results, preparation) for row in made.rows),
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        seconds=time.perf_counter() - start,
        calibration_batches=preparation.batches,
        transforms=preparation.records,
    )


def _module_report(row: PlanRow, results: Mapping[str, Rounded], preparation: Preparation) -> ModuleReport:
    if row.scheme is None:
        return ModuleReport(plan=row, fallbacks=row.fallbacks)
    result = results[row.tied_to or row.name]
    return ModuleReport(
        plan=row,
        rounding=result.rounding,
        relative_error=result.relative_error,
        seconds=0.0 if row.tied_to else result.seconds,
        fallbacks=row.fallbacks + (() if row.tied_to else result.fallbacks),
        activation=preparation.ranges[row.name].found() if row.name in preparation.ranges else None,
    )


def round_weight(weight: Tensor, row: PlanRow, preparation: Preparation, staging: WeightStore) -> Rounded:
    """Chooses the integers of one weight `[O, I]`, some rows at a time, and stages them."""
    start = time.perf_counter()
    assert row.scheme is not None
    weight_format = row.scheme.weight
    error = norm = 0.0
    shifts: list[Tensor] = []
    statistics = preparation.statistics.get(row.name)
    if isinstance(statistics, InputHessian):
        return round_layer(row, weight, statistics, preparation, staging)[0]
    if isinstance(weight_format, FloatFormat):  # cast when it is swapped in: it costs no search
        for rows in _row_chunks(weight):
            error += (rows.float() - rows.to(weight_format.dtype).float()).square().sum(dtype=torch.float64).item()
            norm += rows.float().square().sum(dtype=torch.float64).item()
    else:
        rounding, importance = preparation.rounding_of(row), preparation.importance_of(row)
        group_size = weight_format.group_size(weight.shape[1])
        packer = WeightPacker(weight_format, row.layout, (weight.shape[0], weight.shape[1]))
        begin = 0
        for rows in _row_chunks(weight, weight_format):
            part = rounding.round(rows, weight_format, importance)
            if row.name in preparation.evened and isinstance(weight_format, IntFormat):
                mean = preparation.means[row.name].of_rows(begin, len(rows), weight.shape[0])
                part = part if mean is None else evened_out(part, rows, weight_format, mean)
            begin += len(rows)
            packer.add(part)
            difference = part.dequantize(group_size) - rows
            shifts.append(_shift(preparation, row, difference, begin - len(rows)))
            error += difference.square_().sum(dtype=torch.float64).item()
            norm += rows.float().square().sum(dtype=torch.float64).item()
        staging.put(row.name, packer.packed())
    relative_error = (error / norm) ** 0.5 if norm > 0 else 0.0
    name = "cast" if isinstance(weight_format, FloatFormat) else type(rounding).__name__
    shift = torch.cat(shifts) if row.name in preparation.corrected else None
    return Rounded(relative_error, time.perf_counter() - start, name, shift=shift)


def round_layer(
    row: PlanRow,
    weight: Tensor,
    inputs: InputHessian,
    preparation: Preparation,
    staging: WeightStore,
    processes: Processes | None = None,
) -> tuple[Rounded, Tensor]:
    """Chooses the integers of one weight from the Hessian of its inputs and stages them; also gives the new weight."""
    start = time.perf_counter()
    rounding = preparation.hessian_rounding
    assert rounding is not None and row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)
    weight_format = row.scheme.weight
    layer = _solve(rounding, row.name, weight.detach(), weight_format, inputs, processes)
    rounded = layer.codes.dequantize(weight_format.group_size(weight.shape[1]))
    packer = WeightPacker(weight_format, row.layout, (weight.shape[0], weight.shape[1]))
    packer.add(layer.codes)
    staging.put(row.name, packer.packed())
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    difference = rounded - weight.detach()
    error = torch.linalg.vector_norm(difference, dtype=torch.float64).item()
    shift = _shift(preparation, row, difference, 0) if row.name in preparation.corrected else None
    seconds = time.perf_counter() - start
    return Rounded(error / norm if norm > 0 else 0.0, seconds, type(rounding).__name__, layer.fallbacks, shift), rounded


def _solve(
    rounding: HessianRounding,
    name: str,
    weight: Tensor,
    weight_format: PackedFormat,
    inputs: InputHessian,
    processes: Processes | None,
) -> RoundedLayer:
    """Rounds a weight; several processes take some of its rows each, which no algorithm mixes."""
    if inputs.groups > 1 and rounding.by_groups and weight_format.granularity != PerTensor():
        parts = [
            rounding.round_layer(name, part, weight_format, its_inputs)
            for part, its_inputs in zip(weight.chunk(inputs.groups), inputs.of_groups(), strict=True)
        ]
        return _joined(parts)
    if processes is None or weight_format.granularity == PerTensor():
        return rounding.round_layer(name, weight, weight_format, inputs)
    rows = processes.part(weight.shape[0], PANEL)
    part: RoundedLayer | None = None
    with processes.failing_together():
        if rows.start < rows.stop:
            part = rounding.round_layer(name, weight[rows].contiguous(), weight_format, inputs)
    return _joined([part for part in processes.gather(part) if part is not None])


def _joined(parts: Sequence[RoundedLayer]) -> RoundedLayer:
    """The layer whose rows were rounded in parts; of their fallbacks, the first part's that has any."""
    zero_points = [part.codes.zero_point for part in parts if part.codes.zero_point is not None]
    codes = WeightCodes(
        torch.cat([part.codes.codes for part in parts]),
        torch.cat([part.codes.scale for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        parts[0].codes.codebook,
    )
    return RoundedLayer(codes, next((part.fallbacks for part in parts if part.fallbacks), ()))


def _shift(preparation: Preparation, row: PlanRow, error: Tensor, begin: int) -> Tensor:
    """What the error of some rows of a weight adds to their outputs on average; zeros where means are not collected."""
    assert row.shape is not None
    if row.name not in preparation.corrected:
        return error.new_zeros(len(error), dtype=torch.float64)
    return preparation.means[row.name].shift(error, begin, row.shape[0])


def _round_in_order(
    model: nn.Module,
    preparation: Preparation,
    staging: Staging,
    batches: Sequence[object],
    forward: Forward | None,
    progress: bool,
    resources: Resources,
) -> dict[str, Rounded]:
    rows = {row.name: row for row in preparation.plan.targets}
    results: dict[str, Rounded] = {}
    store: WeightStore = staging
    finished = 0
    if resources.journal is not None:
        store = JournalStaging(staging, resources.journal)
        finished = finished_steps(resources.journal, resources.processes)
        for step in range(finished):
            results.update(restore(resources.journal, step, rows, staging))

    def round_one(name: str, layer: nn.Module, inputs: InputHessian) -> Tensor:
        results[name], rounded = round_layer(
            rows[name], weight_matrix(layer), inputs, preparation, store, resources.processes
        )
        if isinstance(store, JournalStaging):
            store.note(name, results[name])
        return rounded

    names = [name for name, statistics in preparation.statistics.items() if isinstance(statistics, InputHessian)]
    rounding = preparation.hessian_rounding
    round_in_order(
        model,
        names,
        batches,
        round_one,
        forward=forward,
        drift=rounding is not None and rounding.needs_drift,
        progress=progress,
        resources=resources,
        finished=finished,
    )
    preparation.batches += len(batches)
    return results


def finished_steps(journal: Journal, processes: Processes | None) -> int:
    """Steps that every process has finished."""
    return journal.finished if processes is None else min(processes.gather(journal.finished))


def restore(
    journal: Journal, step: int, rows: Mapping[str, PlanRow], staging: WeightStore | None
) -> dict[str, Rounded]:
    """The layers of a finished step, whose weights are staged unless `staging` is None."""
    results: dict[str, Rounded] = {}
    tensors = journal.tensors(step) if staging is not None else {}
    for name, record in journal.records(step).items():
        if "rounding" not in record:
            continue  # what stays in floating point
        held = tensors.get(name, {})
        results[name] = Rounded.from_dict(record, held.pop("shift", None))
        shape = rows[name].shape
        if staging is not None and held and shape is not None:
            staging.put(name, packed_weight(held, rows[name].layout, shape))
    return results


@dataclass(frozen=True, slots=True)
class JournalStaging:
    """Stages weights and writes them into the journal as well."""

    staging: WeightStore
    journal: Journal

    def put(self, key: str, weight: PackedWeight) -> None:
        """Stores a weight."""
        self.staging.put(key, weight)
        self.journal.add(key, {name: t for name, t in weight.tensors().items() if t is not None}, {})

    def get(self, key: str) -> PackedWeight:
        """The weight stored under `key`."""
        return self.staging.get(key)

    def note(self, key: str, result: Rounded) -> None:
        """Adds what is known of it to the journal."""
        tensors = {} if result.shift is None else {"shift": result.shift}
        self.journal.add(key, tensors, result.to_dict())


def _row_chunks(weight: Tensor, weight_format: PackedFormat | None = None) -> Iterator[Tensor]:
    rows = max(PANEL, _CHUNK_ELEMENTS // weight.shape[1] // PANEL * PANEL)
    if weight_format is not None and weight_format.granularity == PerTensor():
        rows = weight.shape[0]
    return iter(torch.split(weight.detach(), rows))


def _corrected_bias(model: nn.Module, name: str, result: Rounded) -> nn.Parameter | None:
    """The bias of a layer, less what rounding adds; None leaves it as it is."""
    if result.shift is None:
        return None
    bias = model.get_submodule(name)._parameters["bias"]
    assert bias is not None
    return nn.Parameter((bias.detach().double() - result.shift).to(bias.dtype), requires_grad=bias.requires_grad)


def commit(
    model: nn.Module,
    made: Plan,
    staging: WeightStore,
    activations: Activations,
    biases: dict[str, nn.Parameter | None],
) -> None:
    """Swaps all modules. An interrupt waits until the last one is in: half a conversion would be no model at all."""
    swapped: dict[str, nn.Module] = {}
    with interrupts_deferred():
        for row in sorted(made.targets, key=lambda r: r.tied_to is not None):  # owners of a shared weight first
            new = _converted(model.get_submodule(row.name), row, swapped, staging, activations.get(row.name))
            bias = biases.get(row.name)
            if bias is not None:
                new._parameters["bias"] = bias
            replace_module(model, (row.name, *row.aliases), new)
            swapped[row.name] = new
        disable_fast_paths(model)


def _converted(
    old: nn.Module,
    row: PlanRow,
    swapped: dict[str, nn.Module],
    staging: WeightStore,
    activation: tuple[Tensor, Tensor] | None,
) -> nn.Module:
    scheme, home = row.scheme, None if row.tied_to is None else swapped[row.tied_to]
    assert scheme is not None and isinstance(old, nn.Linear | nn.Embedding | ConvModule)
    bias = old._parameters.get("bias")
    if not isinstance(scheme.weight, FloatFormat):
        packed = home.packed_weight if isinstance(home, QuantizedModule) else staging.get(row.name)
        return quantized_module(old, scheme, packed, bias, activation)
    if isinstance(home, HalfLinear | HalfConv | HalfEmbedding):
        return quantized_module(old, scheme, home.weight, bias)
    weight = nn.Parameter(old.weight.detach().to(scheme.weight.dtype), requires_grad=old.weight.requires_grad)
    return quantized_module(old, scheme, weight, bias)
