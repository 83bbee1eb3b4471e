"""Quantizing a model that is larger than memory: from safetensors shards to a quantized file, block by block."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from halfbyte.algorithms import HessianRounding
from halfbyte.calibration import Data, Forward, all_batches
from halfbyte.conversion import report_of
from halfbyte.errors import QuantizationError
from halfbyte.fallback import OnFallback
from halfbyte.flow import find_blocks, module_bytes
from halfbyte.io.checkpoint import Checkpoint
from halfbyte.io.saving import save
from halfbyte.io.tensors import Slot, tensor_slots
from halfbyte.memory import MemorySize
from halfbyte.plan import Plan
from halfbyte.preparation import Algorithm, Preparation
from halfbyte.processes import Processes, together
from halfbyte.recipe import Recipe
from halfbyte.report import Report
from halfbyte.schemes import Scheme
from halfbyte.streamed_work import StreamedWork
from halfbyte.workflow import open_journal


def quantize_checkpoint(
    skeleton: nn.Module,
    checkpoint: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    scheme_or_recipe: Scheme | Recipe | Plan,
    *,
    data: Data | None = None,
    algorithms: Sequence[Algorithm] = (),
    progress: bool = True,
    max_memory: MemorySize | None = None,
    on_fallback: OnFallback = "warn",
    forward: Forward | None = None,
    state_folder: str | os.PathLike[str] | None = None,
    distributed: bool = False,
) -> Report:
    """Quantizes a checkpoint into a file that `load_` reads; the whole model is never in memory.

    In memory are what lies outside the repeated blocks (embeddings, the last norm, the head), one block (two with error
    feedback), and what `max_memory` leaves for hidden states. The file has the very bytes that `quantize_` and `save` would
    write. Finished blocks wait in a state folder, so that the same call goes on after an interrupt; while the file is
    written, the disk holds the quantized model twice.

    Args:
        skeleton: The float model with its parameters on the meta device, as `without_weights` builds it. Buffers that are not
            in the checkpoint must have their values. It is not changed. Weights are computed with in its dtypes.
        checkpoint: A safetensors file, several, an index, or the folder of a Hugging Face model. Names are those of the
            skeleton's `state_dict`; others are not read.
        path: The file to write.
        scheme_or_recipe, data, algorithms, progress, on_fallback, forward: As in `quantize_`. Only roundings: transforms, bias
            correction and static activations need the whole float model. `data` is for roundings that need it (`GPTQ`).
            `on_fallback="raise"` may raise at work, since weights are seen then.
        max_memory: What the work may take, without the interpreter and the batches; None for no limit on hidden states.
            Refused before any work if it is less than needed.
        state_folder: Where finished blocks wait; default: `<path>.state`, which is deleted when the file is complete.
        distributed: As in `quantize_`; the first process writes the file.

    Returns:
        The report.

    Raises:
        QuantizationError: as `quantize_`; a model without repeated blocks, or whose blocks do not simply feed one another;
            `path` is a file of the checkpoint.
        FileFormatError: the checkpoint lacks a tensor, or has it in another shape; names it.
        OSError: a file cannot be written (disk full); finished blocks are kept.

    Example:
        >>> from safetensors.torch import save_file
        >>> model = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3))))
        >>> save_file(model.state_dict(), tmp_path / "float.safetensors")
        >>> with torch.device("meta"):
        ...     skeleton = nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3))))
        >>> path = tmp_path / "quantized.safetensors"
        >>> report = hb.quantize_checkpoint(
        ...     skeleton, tmp_path / "float.safetensors", path, hb.int4_weight_only(32), progress=False
        ... )
        >>> quantized = hb.load_(skeleton, path)
    """
    start = time.perf_counter()
    processes = Processes() if distributed else None
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist; make it first")
    source = Checkpoint(checkpoint)
    if Path(path).resolve() in {file.resolve() for file in source.files}:
        raise QuantizationError(f"{path} is one of the files to read, and would be overwritten; name another file")
    model = copy.deepcopy(skeleton)
    blocks = find_blocks(model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    if not blocks:
        raise QuantizationError(
            "the model has no repeated blocks to work on one at a time; load it and use hb.quantize_"
        )
    _check(model, source)
    inside = tuple(block + "." for block in blocks)
    slots = tensor_slots(model)
    outside = {name: slot for name, slot in slots.items() if not name.startswith(inside)}
    preparation = Preparation.of(
        model,
        scheme_or_recipe,
        algorithms,
        max_memory,
        on_fallback,
        in_order=True,
        resident=_resident_bytes(model, blocks, outside, algorithms),
    )
    batches = _checked_data(preparation, data)
    folder = Path(path).with_name(Path(path).name + ".state") if state_folder is None else Path(state_folder)
    dtypes = [f"{name} {slot.tensor.dtype}" for name, slot in slots.items()]
    journal = open_journal(folder, [source.identity, dtypes], preparation, batches, processes)
    work = StreamedWork(model, source, blocks, preparation, journal, processes)
    try:
        with torch.no_grad():
            work.fill(outside)
            work.round(batches, forward, progress)
            work.assemble()
        with together(processes):  # nobody goes on before the file is there
            if processes is None or processes.rank == 0:
                save(model, path)
    except BaseException:
        if state_folder is None and journal.finished == 0:
            journal.delete()
        raise
    if state_folder is None:
        journal.delete()
    return report_of(preparation, work.results, start)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built inside have parameters on the meta device, which take no memory, and real buffers.

    `torch.device("meta")` leaves buffers that are computed once, such as rotary frequencies, without values; this does not.

    Example:
        >>> with hb.without_weights():
        ...     model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
        >>> model[0].weight.is_meta, model[1].running_var.is_meta
        (True, False)
    """
    register = nn.Module.register_parameter

    def register_without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(
                parameter.detach().to("meta"), requires_grad=parameter.requires_grad
            )

    nn.Module.register_parameter = register_without_values  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check(model: nn.Module, source: Checkpoint) -> None:
    """Checks that every value the model needs is there."""
    found: set[int] = set()
    slots = tensor_slots(model)
    for name, slot in slots.items():
        if name in source:
            found.add(id(slot.tensor))
            if source.shape(name) != tuple(slot.tensor.shape):
                raise QuantizationError(
                    f"{name} has shape {tuple(slot.tensor.shape)} in the skeleton and {source.shape(name)} in the checkpoint; "
                    "build the skeleton from the checkpoint's configuration"
                )
    missing = [name for name, slot in slots.items() if id(slot.tensor) not in found and slot.tensor.is_meta]
    if missing:
        hint = (
            "build the skeleton with hb.without_weights(), which gives buffers their values"
            if all(not slots[name].is_parameter for name in missing)
            else f"build the skeleton from the checkpoint's configuration (it has {', '.join(source.names[:2])}, ...)"
        )
        raise QuantizationError(
            f"{missing[0]} ({len(missing)} in all) has no value and is not in the checkpoint; {hint}"
        )


def _resident_bytes(
    model: nn.Module, blocks: Sequence[str], outside: Mapping[str, Slot], algorithms: Sequence[Algorithm]
) -> int:
    """Bytes of float weights in memory, less the copy of a block that goes with Hessians."""
    last = algorithms[-1] if algorithms else None
    copies = int(last.needs_drift) if isinstance(last, HessianRounding) else 1
    largest = max(module_bytes(model.get_submodule(block)) for block in blocks)
    return sum({id(slot.tensor): slot.tensor.nbytes for slot in outside.values()}.values()) + copies * largest


def _checked_data(preparation: Preparation, data: Data | None) -> list[object]:
    refused = [type(a).__name__ for a in (*preparation.transforms, *preparation.corrections)]
    refused += ["a scheme with static activations"] if preparation.ranges else []
    refused += [f"taking {name} apart" for name in sorted(preparation.plan.taken_apart)]
    if refused:
        raise QuantizationError(f"{', '.join(refused)} needs the whole float model in memory: use hb.quantize_")
    in_order = preparation.hessian_rounding is not None
    if data is None and preparation.needing_data:
        raise QuantizationError(f"{', '.join(preparation.needing_data)} needs calibration data: pass data=...")
    if data is not None and not in_order:
        raise QuantizationError("data is used block by block only with an algorithm such as hb.GPTQ(); leave it out")
    return [] if data is None else all_batches(data)
