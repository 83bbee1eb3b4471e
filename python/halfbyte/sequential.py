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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from halfbyte.calibration import Forward, evaluating, run_batch, without_padding
from halfbyte.convolution import ConvGeometry, ConvModule
from halfbyte.errors import QuantizationError
from halfbyte.flow import (
    Blocks,
    BlocksDone,
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
from halfbyte.processes import Processes, together
from halfbyte.progress import track
from halfbyte.staging import TensorStore
from halfbyte.table import format_bytes
from halfbyte.targets import set_weight_matrix, weight_shape

if TYPE_CHECKING:
    from halfbyte.io.journal import Journal

RoundLayer: TypeAlias = Callable[[str, nn.Module, InputHessian], Tensor]
"""Rounds the named layer and gives its new weight in floating point, `[O, I]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What `round_in_order` works with.

    Attributes:
        blocks: Where blocks come from; None for the model itself.
        memory: Bytes that hidden states, and running a block on a batch, may take beside what the plan counts; None for no
            limit. Hidden states get half, and go to a temporary file past that.
        journal: Keeps what is finished, by block.
        processes: Share the data and the layers.
    """

    blocks: Blocks | None = None
    memory: int | None = None
    journal: Journal | None = None
    processes: Processes | None = None


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
    section = _Section(
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
    whole = _Section(
        module=copy.deepcopy(model),
        reference=model if drift else None,
        names={name: name for name in names},
        batches=batches,
        run=lambda module, batch, _: run(module, batches[batch]),
        resources=resources,
    )
    whole.round(round_layer, progress=progress)


def _advance(flow: Flow, section: _Section, index: int, journal: Journal | None) -> None:
    """Replaces the hidden states by what the section returns."""
    for batch in range(len(section.batches)):
        if section.resources.memory is not None:
            return_free_memory()
        hidden = {"hidden": hidden_of(section.run(section.module, batch, False))}
        if section.reference is not None:
            hidden["float"] = hidden_of(section.run(section.reference, batch, True))
        flow.put(batch, hidden["hidden"], hidden.get("float"))
        if journal is not None:
            journal.save_flow(index, batch, hidden)


@dataclass(slots=True)
class _Stage:
    """Layers that get one tensor; `tensor` keeps it alive while stages are told apart, so that no other is taken for it."""

    tensor: Tensor | None
    reads: ConvGeometry | None
    """How convolutions read it; those that do so otherwise have other rows."""
    names: list[str] = field(default_factory=list)
    once: bool = True
    """Each runs once a batch, so that a run may end when the first one was reached."""


def _reads(module: nn.Module) -> ConvGeometry | None:
    if not isinstance(module, ConvModule):
        return None
    return replace(ConvGeometry.of(module), out_channels=module.groups)


@dataclass(slots=True, kw_only=True)
class _Section:
    """A copy of a block (or of the model), the layers to round in it by their names in the model, and its calls."""

    module: nn.Module
    reference: nn.Module | None
    """The original in floating point, where drift is wanted."""
    names: dict[str, str]
    batches: Sequence[object]
    run: Callable[[nn.Module, int, bool], object]
    """Runs the module on a batch, by number: on what the float model produces, or not."""
    resources: Resources

    def round(self, round_layer: RoundLayer, *, progress: bool) -> None:
        """Rounds layers that share an input together, in order of execution."""
        for stage in track(self._stages(), "quantizing layers", enabled=progress):
            inputs = self._collect(stage)
            for name in stage.names:
                if self.resources.memory is not None:
                    return_free_memory()
                layer = self._layer(name)
                weight = round_layer(name, layer, inputs)
                set_weight_matrix(layer, weight)

    def _layer(self, name: str) -> nn.Module:
        return self.module.get_submodule(self.names[name])

    def _stages(self) -> list[_Stage]:
        """The layers in the order in which they first run; those given the very same tensor together."""
        stages: list[_Stage] = []
        stage_of: dict[str, _Stage] = {}
        names = {id(self._layer(name)): name for name in self.names}

        def record(module: nn.Module, args: tuple[object, ...]) -> None:
            name, given = names[id(module)], args[0] if args else None
            if name in stage_of:
                stage_of[name].once = False
            elif isinstance(given, Tensor):
                reads = _reads(module)
                stage = next((s for s in stages if s.tensor is given and s.reads == reads), None)
                if stage is None:
                    stage = _Stage(given, reads)
                    stages.append(stage)
                stage.names.append(name)
                stage_of[name] = stage

        with ExitStack() as hooks:
            for name in self.names:
                hooks.callback(self._layer(name).register_forward_pre_hook(record).remove)
            runs = 0
            with together(self.resources.processes):
                while len(stage_of) < len(self.names) and runs < len(self.batches):
                    with without_padding(self.batches[runs]):
                        self.run(self.module, runs, False)
                    runs += 1
        for stage in stages:
            stage.tensor = None
            stage.once = stage.once and runs == 1  # else batches take different ways through the block
        if self.resources.processes is not None:
            found = self.resources.processes.gather([(stage.names, stage.once) for stage in stages])
            if any(other != found[0] for other in found):  # as where tokens are routed: each layer by itself
                ordered = dict.fromkeys(
                    name for stages_there in found for names_there, _ in stages_there for name in names_there
                )
                stages = [_Stage(None, None, [name], once=False) for name in ordered]
        known = {name for stage in stages for name in stage.names}
        never = sorted(set(self.names) - known)  # an error later, which says so
        return stages + [_Stage(None, None, [name], once=False) for name in never]

    def _collect(self, stage: _Stage) -> InputHessian:
        name = stage.names[0]
        layer = self._layer(name)
        inputs = InputHessian(name)
        with together(self.resources.processes):
            paired = self._observe(stage, inputs)
        if self.resources.processes is not None:
            paired = all(self.resources.processes.gather(paired))
        if not paired:
            inputs.discard_drift()
        if self.resources.processes is not None:
            inputs.add_up(self.resources.processes, *hessian_shape(layer))
        return inputs

    def _observe(self, stage: _Stage, inputs: InputHessian) -> bool:
        """Runs all batches; whether the drift could be observed."""
        name = stage.names[0]
        layer = self._layer(name)
        paired = self.reference is not None and not isinstance(layer, ConvModule)  # drift is for rows of features
        for batch in range(len(self.batches)):
            if self.resources.memory is not None:
                return_free_memory()
            with without_padding(self.batches[batch]):
                seen = self._inputs(self.module, name, batch, stop=stage.once)
                for x in seen:
                    inputs(layer, (x,))
                if self.reference is None or not paired:
                    continue
                expected = self._inputs(self.reference, name, batch, stop=stage.once)
                paired = [x.shape for x in seen] == [x.shape for x in expected]  # else tokens were routed otherwise
                for x, float_x in zip(seen, expected, strict=False):
                    if paired:
                        inputs.update_drift(x, float_x)
        return paired

    def _inputs(self, module: nn.Module, name: str, batch: int, *, stop: bool) -> list[Tensor]:
        """What a layer gets in one batch; `stop` ends the run at its first call."""
        seen: list[Tensor] = []

        def record(module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.append(args[0] if stop else args[0].clone())  # which later layers may change in place
            if stop:
                raise BlocksDone

        handle = module.get_submodule(self.names[name]).register_forward_pre_hook(record)
        try:
            with suppress(BlocksDone):
                self.run(module, batch, module is self.reference)
        finally:
            handle.remove()
        return seen


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


def hessian_shape(layer: nn.Module) -> tuple[int, int]:
    """Width of a layer's Hessians, and their number."""
    return weight_shape(layer)[1], layer.groups if isinstance(layer, ConvModule) else 1


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
