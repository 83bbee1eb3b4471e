"""Calibration in order: every layer is rounded on inputs that the already quantized layers before it produce.

The model's repeated blocks (the layers of a transformer) are worked on one at a time, each as a copy whose weights are
replaced as they are rounded; the model itself is only read. Memory beside it: one block, the Hessians of layers that share
one input, and what flows from block to block for every batch. With `drift`, the float model's inputs of every layer are
compared with those that it really gets: then two such flows, and every block runs twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor, nn

from halfbyte.calibration import Forward, evaluating, run_batch, without_padding
from halfbyte.convolution import ConvGeometry, ConvModule
from halfbyte.hessian import InputHessian
from halfbyte.progress import track
from halfbyte.targets import is_target, set_weight_matrix

RoundLayer: TypeAlias = Callable[[str, nn.Module, InputHessian], Tensor]
"""Rounds the named layer and gives its new weight in floating point, `[O, I]`."""


def round_in_order(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[object],
    round_layer: RoundLayer,
    *,
    forward: Forward | None = None,
    drift: bool = False,
    progress: bool = True,
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

    Raises:
        QuantizationError: a layer never ran, or NaN among its inputs; and what `round_layer` raises.
    """
    run = run_batch if forward is None else forward
    with evaluating(model), without_cache(model):
        blocks = find_blocks(model, names)
        flow = _capture(model, blocks, batches, run, drift=drift, progress=progress) if blocks else None
        if flow is None:
            whole = _Section(
                module=copy.deepcopy(model),
                reference=model if drift else None,
                names={name: name for name in names},
                batches=batches,
                run=lambda module, batch, _: run(module, batches[batch]),
            )
            whole.round(round_layer, progress=progress)
            return
        inside = tuple(block + "." for block in blocks)
        outside = [name for name in names if not name.startswith(inside)]
        for index, block in track(list(enumerate(blocks)), "quantizing blocks", enabled=progress):
            section = _Section(
                module=copy.deepcopy(model.get_submodule(block)),
                reference=model.get_submodule(block) if drift else None,
                names={name: name[len(block) + 1 :] for name in names if name.startswith(block + ".")},
                batches=batches,
                run=functools.partial(flow.run, index),
            )
            section.round(round_layer, progress=False)
            if outside or index + 1 < len(blocks):
                flow.advance(section)
        if outside:
            _round_outside(model, blocks[-1], outside, flow, batches, run, round_layer, drift=drift)


def find_blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the repeated blocks: the children, all of one type, of the list that holds most of the named layers."""
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        children = list(module)
        if len({type(child) for child in children}) > 1 or is_target(children[0]):
            continue
        prefix = name + "." if name else ""
        inside = sum(n.startswith(prefix) for n in names)
        if inside > best[0]:
            best = (inside, [prefix + child for child, _ in module.named_children()])
    return best[1]


def section_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of the largest copy that `round_in_order` makes: a block, or the model if it has none."""
    sections = [model.get_submodule(block) for block in find_blocks(model, names)] or [model]
    return max(sum(t.nbytes for t in (*s.parameters(), *s.buffers())) for s in sections)


@dataclass(slots=True)
class _Flow:
    """What flows between the blocks, by batch: the hidden states, and the other arguments of each block."""

    hidden: list[Tensor] = field(default_factory=list)
    float_hidden: list[Tensor] = field(default_factory=list)
    """Of the float model, if it flows along."""
    others: list[list[tuple[tuple[object, ...], dict[str, object]]]] = field(default_factory=list)

    def run(self, index: int, block: nn.Module, batch: int, reference: bool) -> object:
        """Calls the block with what the quantized blocks before it return, or (`reference`) the float ones."""
        args, kwargs = _fresh(*self.others[batch][index])
        hidden = (self.float_hidden if reference else self.hidden)[batch]
        return block(hidden.clone(), *args, **kwargs)  # it may add to it in place

    def advance(self, section: _Section) -> None:
        """Replaces the hidden states by what the section returns."""
        for batch in range(len(self.hidden)):
            if section.reference is not None:
                self.float_hidden[batch] = _hidden_of(section.run(section.reference, batch, True))
            self.hidden[batch] = _hidden_of(section.run(section.module, batch, False))


def _fresh(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """A copy that shares the tensors: blocks may change other arguments, such as caches, and each run gets its own."""
    return copy.deepcopy((args, kwargs), {id(tensor): tensor for tensor in _tensors((args, kwargs))})


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _hidden_of(output: object) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@dataclass(slots=True)
class _Stop(Exception):
    """Ends a run whose rest is not needed."""


def _capture(
    model: nn.Module,
    blocks: Sequence[str],
    batches: Sequence[object],
    run: Callable[[nn.Module, object], object],
    *,
    drift: bool,
    progress: bool,
) -> _Flow | None:
    """Runs the float model once; None unless each block gets what the one before it returned, and each runs once."""
    flow = _Flow()
    previous: list[object] = []  # of the batch at work: what the last block returned
    chained = True

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal chained
        index, others = order[id(module)], flow.others[-1]
        hidden = args[0] if args else None
        if index != len(others) or not isinstance(hidden, Tensor):
            chained = False
        elif index == 0:
            flow.hidden.append(hidden.clone())  # a block may add to it in place
        else:
            last = previous[-1]
            chained = chained and hidden is (last[0] if isinstance(last, tuple) and last else last)
        if not chained:
            raise _Stop
        others.append(_fresh(args[1:], kwargs))

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        previous[:] = [output]

    modules = [model.get_submodule(block) for block in blocks]
    order = {id(module): index for index, module in enumerate(modules)}
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        for batch in track(batches, "calibrating", enabled=progress):
            flow.others.append([])
            try:
                run(model, batch)
            except _Stop:
                return None
            if len(flow.others[-1]) != len(blocks):
                return None
    flow.float_hidden = list(flow.hidden) if drift else []
    return flow


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

    def round(self, round_layer: RoundLayer, *, progress: bool) -> None:
        """Rounds layers that share an input together, in order of execution."""
        for stage in track(self._stages(), "quantizing layers", enabled=progress):
            inputs = self._collect(stage)
            for name in stage.names:
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
            while len(stage_of) < len(self.names) and runs < len(self.batches):
                self.run(self.module, runs, False)
                runs += 1
        for stage in stages:
            stage.tensor = None
            stage.once = stage.once and runs == 1  # else batches take different ways through the block
        never = sorted(set(self.names) - set(stage_of))  # an error later, which says so
        return stages + [_Stage(None, None, [name], once=False) for name in never]

    def _collect(self, stage: _Stage) -> InputHessian:
        name = stage.names[0]
        layer = self._layer(name)
        paired = self.reference is not None and not isinstance(layer, ConvModule)  # drift is for rows of features
        inputs = InputHessian(name)
        for batch in range(len(self.batches)):
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
        if not paired:
            inputs.discard_drift()
        return inputs

    def _inputs(self, module: nn.Module, name: str, batch: int, *, stop: bool) -> list[Tensor]:
        """What a layer gets in one batch; `stop` ends the run at its first call."""
        seen: list[Tensor] = []

        def record(module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.append(args[0] if stop else args[0].clone())  # which later layers may change in place
            if stop:
                raise _Stop

        handle = module.get_submodule(self.names[name]).register_forward_pre_hook(record)
        try:
            with suppress(_Stop):
                self.run(module, batch, module is self.reference)
        finally:
            handle.remove()
        return seen


def _round_outside(
    model: nn.Module,
    last_block: str,
    names: Sequence[str],
    flow: _Flow,
    batches: Sequence[object],
    run: Callable[[nn.Module, object], object],
    round_layer: RoundLayer,
    *,
    drift: bool,
) -> None:
    """Layers before and after the blocks, such as an output head: what the last block returns is replaced."""
    inputs = {name: InputHessian(name) for name in names}
    expected: dict[str, list[Tensor]] = {name: [] for name in names}  # of the batch at work: the float model's inputs
    hidden: Tensor | None = None

    def replace(module: nn.Module, args: tuple[object, ...], output: object) -> object:
        if hidden is None:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def record(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        if hidden is None:
            expected[name].append(args[0].clone())
            return
        inputs[name](module, args)
        if drift and expected[name] and not isinstance(module, ConvModule):
            inputs[name].update_drift(args[0], expected[name].pop(0))

    with ExitStack() as hooks:
        hooks.callback(model.get_submodule(last_block).register_forward_hook(replace).remove)
        for name in names:
            hook = functools.partial(record, name)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for index, batch in enumerate(batches):
            with without_padding(batch):
                if drift:
                    hidden = None
                    run(model, batch)
                hidden = flow.hidden[index]
                run(model, batch)
            expected = {name: [] for name in names}
    for name, hessian in inputs.items():
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
