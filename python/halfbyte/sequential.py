"""Calibration in order: every layer is rounded on inputs that the already quantized layers before it produce.

The model's repeated blocks (the layers of a transformer) are worked on one at a time, each as a copy whose weights are
replaced as they are rounded; the model itself is only read. Memory beside it: one block, the Hessians of layers that share
one input, and what flows from block to block for every batch. With `drift`, the float model's inputs of every layer are
compared with those that it really gets: then two such flows, and every block runs twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from halfbyte.calibration import Forward, evaluating, run_batch, without_padding
from halfbyte.convolution import ConvModule
from halfbyte.errors import QuantizationError
from halfbyte.flow import (
    Blocks,
    BlocksInMemory,
    Flow,
    Run,
    capture,
    find_blocks,
    hidden_of,
    module_bytes,
    replace_forward,
)
from halfbyte.hessian import InputHessian
from halfbyte.memory import keep_large_tensors_apart, return_free_memory
from halfbyte.processes import together
from halfbyte.progress import track
from halfbyte.section import Resources, RoundLayer, Section, hessian_shape
from halfbyte.staging import TensorStore
from halfbyte.table import format_bytes

if TYPE_CHECKING:
    from halfbyte.io.journal import Journal


def round_in_order(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[object],
    round_layer: RoundLayer,
    *,
    forward: Forward | None = None,
    drift: bool = False,
    progress: bool = True,
    resources: Resources | None = None,
    finished: int = 0,
    finish: Callable[[int], None] = lambda step: None,
) -> None:
    """Calls `round_layer` for every named Linear or convolution, in the order in which they run.

    Where the blocks do not simply feed one another, the whole model is one block.

    Args:
        model: Left as it is; it runs in evaluation mode.
        names: Qualified names of the layers.
        batches: Calibration data.
        round_layer: Called once a layer.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.
        drift: Also give `InputHessian.drift`.
        progress: Show progress bars on stderr.
        resources: Memory, files and processes; default: the model in memory, no limit, alone.
        finished: Blocks that the journal has already.
        finish: Called after each block, with its number, before the journal closes it.

    Raises:
        QuantizationError: a layer never ran, or NaN among its inputs; and what `round_layer` raises.
    """
    run = run_batch if forward is None else forward
    resources = resources or Resources()
    source = resources.blocks or BlocksInMemory(model)
    room = None if resources.memory is None else resources.memory // 2
    if resources.memory is not None:
        keep_large_tensors_apart()
    blocks = find_blocks(model, names)
    with (
        evaluating(model),
        without_cache(model),
        TensorStore(room) as store,
    ):
        flow = None
        if blocks:
            with together(resources.processes):
                flow = capture(model, blocks, source, batches, run, store, drift=drift, progress=progress, room=room)
                if flow is None and resources.blocks is not None:
                    raise QuantizationError(
                        "the model's blocks do not simply feed one another, so that they cannot be worked on one at a "
                        "time: load the model and use hb.quantize_"
                    )
        if flow is None:
            _round_whole(model, names, batches, run, round_layer, resources, drift=drift, progress=progress)
            return
        journal = resources.journal
        if journal is not None and finished:
            for batch in range(len(batches)):
                kept = journal.flow(finished - 1, batch)
                flow.put(batch, kept["hidden"], kept.get("float"))
        inside = tuple(block + "." for block in blocks)
        outside = [name for name in names if not name.startswith(inside)]
        for index, block in track(list(enumerate(blocks))[finished:], "quantizing blocks", enabled=progress):
            _round_block(index, block, names, batches, source, flow, round_layer, resources, drift=drift)
            finish(index)
            if journal is not None:
                journal.finish(index)
        if outside:
            _round_outside(model, blocks, outside, flow, batches, run, round_layer, resources, drift=drift)


def _round_block(
    index: int,
    block: str,
    names: Sequence[str],
    batches: Sequence[object],
    source: Blocks,
    flow: Flow,
    round_layer: RoundLayer,
    resources: Resources,
    *,
    drift: bool,
) -> None:
    """Rounds the layers of a block and moves the flow past it."""
    section = Section(
        module=source.copy(block),
        reference=source.original(block) if drift else None,
        names={name: name[len(block) + 1 :] for name in names if name.startswith(block + ".")},
        batches=batches,
        run=functools.partial(flow.run, index),
        resources=resources,
    )
    section.round(round_layer, progress=False)
    with together(resources.processes):
        _advance(flow, section, index, resources.journal)


def _round_whole(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[object],
    run: Run,
    round_layer: RoundLayer,
    resources: Resources,
    *,
    drift: bool,
    progress: bool,
) -> None:
    """The whole model as one block."""
    size = module_bytes(model)
    if resources.memory is not None and find_blocks(model, names) and size > resources.memory:
        raise QuantizationError(
            "max_memory is too little: the model's blocks do not simply feed one another, so that a copy of the whole model "
            f"is worked on; that takes {format_bytes(size - resources.memory)} more"
        )
    whole = Section(
        module=copy.deepcopy(model),
        reference=model if drift else None,
        names={name: name for name in names},
        batches=batches,
        run=lambda module, batch, _: run(module, batches[batch]),
        resources=resources,
    )
    whole.round(round_layer, progress=progress)


def _advance(flow: Flow, section: Section, index: int, journal: Journal | None) -> None:
    """Replaces the hidden states by what the section returns."""
    for batch in range(len(section.batches)):
        if section.resources.memory is not None:
            return_free_memory()
        hidden = {"hidden": hidden_of(section.output(section.module, batch))}
        if section.reference is not None:
            hidden["float"] = hidden_of(section.output(section.reference, batch))
        flow.put(batch, hidden["hidden"], hidden.get("float"))
        if journal is not None:
            journal.save_flow(index, batch, hidden)


def _round_outside(
    model: nn.Module,
    blocks: Sequence[str],
    names: Sequence[str],
    flow: Flow,
    batches: Sequence[object],
    run: Run,
    round_layer: RoundLayer,
    resources: Resources,
    *,
    drift: bool,
) -> None:
    """Layers before and after the blocks, such as an output head: the blocks themselves are not run again."""
    inputs = {name: InputHessian(name) for name in names}
    expected: dict[str, list[Tensor]] = {name: [] for name in names}  # of the batch at work: the float model's inputs
    hidden: Tensor | None = None
    of_float = False

    def end(*args: object, **kwargs: object) -> object:
        assert hidden is not None
        return flow.output(hidden)

    def record(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        if of_float:
            expected[name].append(args[0].clone())
            return
        inputs[name](module, args)
        if drift and expected[name] and not isinstance(module, ConvModule):
            inputs[name].update_drift(args[0], expected[name].pop(0))

    with ExitStack() as hooks:
        hooks.callback(replace_forward(model, dict.fromkeys(blocks[:-1], flow.hand_on) | {blocks[-1]: end}))
        for name in names:
            hook = functools.partial(record, name)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        with together(resources.processes):
            for index, batch in enumerate(batches):
                with without_padding(batch):
                    for of_float in (True, False) if drift else (False,):
                        hidden = flow.hidden(index, reference=of_float).clone()
                        run(model, batch)
                expected = {name: [] for name in names}
    for name, hessian in inputs.items():
        if resources.processes is not None:
            hessian.add_up(resources.processes, *hessian_shape(model.get_submodule(name)))
        round_layer(name, model.get_submodule(name), hessian)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face models keep keys and values of all tokens unless told not to; nothing here reads them."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        yield
        return
    try:
        setattr(config, "use_cache", False)  # noqa: B010, a config of any type
        yield
    finally:
        setattr(config, "use_cache", True)  # noqa: B010
