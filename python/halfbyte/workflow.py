"""The verbs: `quantize_`, and its steps `prepare_`, `calibrate`, `convert_`.

A conversion first checks everything it can, then computes every layer's integers beside the untouched model, and only then
swaps modules: a call that fails or is interrupted leaves the model as it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from halfbyte.calibration import Data, Forward, all_batches, check_data, run_data
from halfbyte.conversion import convert
from halfbyte.edits import undone_on_failure
from halfbyte.errors import QuantizationError
from halfbyte.fallback import OnFallback
from halfbyte.io.journal import Journal, digest_of
from halfbyte.memory import MemorySize
from halfbyte.plan import Plan
from halfbyte.preparation import PREPARATION, Algorithm, Preparation, preparation_of
from halfbyte.processes import Processes
from halfbyte.qat.convert import convert_qat
from halfbyte.qat.state import is_qat
from halfbyte.recipe import Recipe
from halfbyte.report import Report
from halfbyte.schemes import Scheme
from halfbyte.section import Resources
from halfbyte.swap import in_parts, put_parts_in_place

_STABLE_EVERY = 4  # batches between two looks at whether ranges have converged


def quantize_(
    model: nn.Module,
    scheme_or_recipe: Scheme | Recipe | Plan,
    data: Data | None = None,
    algorithms: Sequence[Algorithm] = (),
    progress: bool = True,
    max_memory: MemorySize | None = None,
    on_fallback: OnFallback = "warn",
    *,
    forward: Forward | None = None,
    state_folder: str | os.PathLike[str] | None = None,
    distributed: bool = False,
) -> Report:
    """Quantizes a model in place, in one call.

    Linear layers get the scheme. Embeddings, and output heads tied to them, are stored at 8 bits a weight at least, unless an
    override names them. Everything else stays in floating point; the report says why.

    Args:
        model: Any module with float32, bfloat16 or float16 weights on the CPU.
        scheme_or_recipe: A scheme for every layer, a `Recipe` with overrides, or a `Plan` made for this model.
        data: Batches of calibration data: tensors, tuples of positional or dicts of keyword arguments. Optional; with it,
            scale search weights errors by the mean square of the inputs.
        algorithms: Transforms of the float model, in order, then how integers are chosen; default: min/max at 8 bits,
            `MSE()` below; static schemes also even errors out on the mean input and correct biases.
        progress: Show a progress bar on stderr.
        max_memory: Bytes (or "6GB") that the model and the work may take together; default: the model and twice its largest
            layer, and with `GPTQ` the hidden states of all batches. Past it they wait in a temporary file (in `TMPDIR`).
            Refused before any work if it cannot be kept. The batches themselves do not count.
        on_fallback: What to do where a module cannot be quantized exactly as asked: "raise" before any work, "warn", or
            "allow". The report lists every fallback.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.
        state_folder: Where an algorithm that works block by block (`GPTQ`) keeps what is finished. The same call goes on
            there after an interrupt, to the same integers. Delete it when the model is saved.
        distributed: All processes of the default `torch.distributed` group (gloo) make this call, each with the same model
            and its own batches. Statistics are those of all batches, rows of layers are shared out, and every process ends
            up with the same quantized model.

    Returns:
        What happened: per-module error, bytes before and after, time, fallbacks.

    Raises:
        QuantizationError: nothing to quantize, quantized already, NaN or inf in a weight, bad data, a pattern that matches
            nothing, a state folder of another run, or another process failed. The model is as it was.
        OSError: a temporary file or the state folder cannot be written (disk full). The model is as it was.
        RuntimeError: `distributed=True` and `torch.distributed` is not initialised.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> report.bytes_after < report.bytes_before / 3
        True
    """
    start = time.perf_counter()
    _refuse_prepared(model)
    processes = Processes() if distributed else None
    preparation = Preparation.of(model, scheme_or_recipe, algorithms, max_memory, on_fallback, in_order=True)
    if data is None and preparation.needing_data:
        names = ", ".join(preparation.needing_data)
        raise QuantizationError(f"{names} needs calibration data: pass data=<iterable of batches>")
    in_order = preparation.hessian_rounding is not None
    if state_folder is not None and not in_order:
        raise QuantizationError(
            "state_folder is for algorithms that work block by block, such as hb.GPTQ(); leave it out, the others are quick"
        )
    if processes is not None:
        preparation.check_distributed()
    with (
        in_parts(model, preparation.plan.taken_apart),
        undone_on_failure(model, preparation.budget.staging) as edits,
    ):
        if data is None:
            return convert(model, preparation, progress, start)
        batches = all_batches(data) if in_order or preparation.transforms else check_data(data)
        journal = None
        if isinstance(batches, list) and in_order and state_folder is not None:
            journal = open_journal(state_folder, model, preparation, batches, processes)
        if isinstance(batches, list) and preparation.transforms:
            preparation.transform(model, batches, forward, edits, progress, processes)
        if isinstance(batches, list) and in_order:
            if (
                preparation.ranges or preparation.means
            ):  # of the float model; the rounding sees what quantized layers give
                with preparation.observing_ranges(model), preparation.sharing(processes):
                    run_data(model, batches, forward=forward, progress=progress)
            resources = Resources(memory=preparation.budget.run, journal=journal, processes=processes)
            return convert(model, preparation, progress, start, batches=batches, forward=forward, resources=resources)
        with preparation.observing(model), preparation.sharing(processes):
            count = run_data(model, batches, forward=forward, progress=progress)
        preparation.batches += count
        return convert(model, preparation, progress, start)


def open_journal(
    folder: str | os.PathLike[str],
    weights: object,
    preparation: Preparation,
    batches: Sequence[object],
    processes: Processes | None,
) -> Journal:
    """The state folder of a run; each process has its own in it.

    Args:
        folder: The folder.
        weights: The model, or what else tells its weights from others.
        preparation: What is to be done.
        batches: Calibration data of this process.
        processes: All processes, or None.
    """
    path = Path(folder)
    if processes is not None:
        path = path / f"process-{processes.rank}-of-{processes.count}"
    tensors = weights.state_dict(keep_vars=True) if isinstance(weights, nn.Module) else weights
    schemes = {row.name: None if row.scheme is None else row.scheme.to_dict() for row in preparation.plan.rows}
    return Journal(
        path,
        {
            "recipe": digest_of(schemes),
            "algorithms": repr((*preparation.transforms, *preparation.corrections, *preparation.algorithms)),
            "weights": digest_of(tensors),
            "data": digest_of(batches),
        },
    )


def prepare_(
    model: nn.Module,
    recipe: Scheme | Recipe | Plan,
    algorithms: Sequence[Algorithm] = (),
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
    _refuse_prepared(model)
    preparation = Preparation.of(model, recipe, algorithms, max_memory, on_fallback)
    if preparation.transforms:
        names = ", ".join(type(t).__name__ for t in preparation.transforms)
        raise QuantizationError(
            f"{names} changes weights on data that is run before statistics are taken; use hb.quantize_(..., data=...)"
        )
    put_parts_in_place(model, preparation.plan.taken_apart)
    preparation.observe(model)
    model.__dict__[PREPARATION] = preparation
    return model


def calibrate(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward | None = None,
    progress: bool = True,
    until_stable: bool = False,
    distributed: bool = False,
) -> nn.Module:
    """Second step of `quantize_`: runs batches through a prepared model, in evaluation mode without gradients.

    May be called several times; statistics add up. If it fails, what the batches before the bad one gave is kept, unless
    `distributed`.

    Args:
        model: A model that `prepare_` prepared.
        data, forward, progress: As in `quantize_`.
        until_stable: Stop as soon as the ranges of all static activations have converged (see
            `hb.observers.ObservedRange`); the report says how many batches that took. A layer that has not run by then
            is an error of `convert_`.
        distributed: All processes of the default `torch.distributed` group make this call, each with its own data, and end
            up with the statistics of all of it.

    Returns:
        The model.

    Raises:
        QuantizationError: the model is not prepared, there were no batches, NaN or inf among a layer's inputs (names the
            batch and the layer), inputs that are not in floating point, or nothing that could become stable.
        RuntimeError: `distributed=True` and `torch.distributed` is not initialised.
    """
    preparation = _prepared(model)
    if until_stable and not preparation.ranges:
        raise QuantizationError("until_stable=True needs static activations, whose ranges settle; use hb.int8_static()")

    def enough(batches: int) -> bool:
        return until_stable and batches % _STABLE_EVERY == 0 and preparation.settled

    with preparation.sharing(Processes() if distributed else None):
        batches = run_data(model, check_data(data), forward=forward, progress=progress, enough=enough)
    preparation.batches += batches
    return model


def convert_(model: nn.Module, *, progress: bool = True) -> Report:
    """Last step of `quantize_`, and of quantization-aware training: replaces the prepared modules by quantized ones.

    Args:
        model: A model that `prepare_` prepared, or one that `prepare_qat_` prepared, trained and in evaluation mode.
        progress: Show a progress bar on stderr.

    Returns:
        The report.

    Raises:
        QuantizationError: the model is not prepared, or an algorithm needs data and none was run. After `prepare_qat_`: it is
            in training mode, fake quantization is off, or the range of a static input was never observed.
    """
    if is_qat(model):
        return convert_qat(model, progress)
    start = time.perf_counter()
    preparation = _prepared(model)
    if preparation.needing_data and not preparation.has_data:
        needing = ", ".join(preparation.needing_data)
        raise QuantizationError(f"{needing} needs calibration data: run hb.calibrate(model, data) first")
    report = convert(model, preparation, progress, start)
    preparation.stop_observing(model)
    del model.__dict__[PREPARATION]
    return report


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_` or `prepare_qat_` was called and `convert_` was not."""
    return preparation_of(model) is not None or is_qat(model)


def _refuse_prepared(model: nn.Module) -> None:
    if is_prepared(model):
        raise QuantizationError("the model is prepared already; finish with hb.convert_(model)")


def _prepared(model: nn.Module) -> Preparation:
    preparation = preparation_of(model)
    if preparation is None:
        raise QuantizationError("the model is not prepared; call hb.prepare_(model, recipe) first, or use hb.quantize_")
    return preparation
