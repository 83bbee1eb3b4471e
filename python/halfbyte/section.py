"""The layers of one block (or of a whole model): told apart by what they read, and rounded in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from halfbyte.calibration import without_padding
from halfbyte.convolution import ConvGeometry, ConvModule
from halfbyte.flow import Blocks, BlocksDone
from halfbyte.hessian import InputHessian
from halfbyte.memory import return_free_memory
from halfbyte.processes import Processes, together
from halfbyte.progress import track
from halfbyte.replay import Replay
from halfbyte.targets import set_weight_matrix, weight_shape

if TYPE_CHECKING:
    from halfbyte.io.journal import Journal

_REPLAY_BYTES = 1 << 30  # for outputs that are not computed again, where memory has no limit

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


@dataclass(slots=True)
class Stage:
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
class Section:
    """A copy of a block (or of the model), the layers to round in it by their names in the model, and its calls."""

    module: nn.Module
    reference: nn.Module | None
    """The original in floating point, where drift is wanted."""
    names: dict[str, str]
    batches: Sequence[object]
    run: Callable[[nn.Module, int, bool], object]
    """Runs the module on a batch, by number: on what the float model produces, or not."""
    resources: Resources
    replays: tuple[Replay, Replay] | None = field(default=None, init=False)
    """Of the module and of the reference, where outputs may be kept."""

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
            for replay in self.replays or ():
                replay.settle([self.names[name] for name in stage.names])

    def output(self, module: nn.Module, batch: int) -> object:
        """What the module or the reference gives for a batch, by number."""
        is_reference = module is self.reference
        if self.replays is None:
            return self.run(module, batch, is_reference)
        with self.replays[is_reference].running(batch):
            return self.run(module, batch, is_reference)

    def _layer(self, name: str) -> nn.Module:
        return self.module.get_submodule(self.names[name])

    def _stages(self) -> list[Stage]:
        """The layers in the order in which they first run; those given the very same tensor together."""
        stages: list[Stage] = []
        stage_of: dict[str, Stage] = {}
        names = {id(self._layer(name)): name for name in self.names}

        def record(module: nn.Module, args: tuple[object, ...]) -> None:
            name, given = names[id(module)], args[0] if args else None
            if name in stage_of:
                stage_of[name].once = False
            elif isinstance(given, Tensor):
                reads = _reads(module)
                stage = next((s for s in stages if s.tensor is given and s.reads == reads), None)
                if stage is None:
                    stage = Stage(given, reads)
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
        if runs == 1 and self.resources.memory is None:
            order = [self.names[name] for name in stage_of]
            either = self.module if self.reference is None else self.reference
            self.replays = (
                Replay(self.module, order, _REPLAY_BYTES // 2),
                Replay(either, order, _REPLAY_BYTES // 2),
            )
        if self.resources.processes is not None:
            found = self.resources.processes.gather([(stage.names, stage.once) for stage in stages])
            if any(other != found[0] for other in found):  # as where tokens are routed: each layer by itself
                ordered = dict.fromkeys(
                    name for stages_there in found for names_there, _ in stages_there for name in names_there
                )
                stages = [Stage(None, None, [name], once=False) for name in ordered]
                self.replays = None
        known = {name for stage in stages for name in stage.names}
        never = sorted(set(self.names) - known)  # an error later, which says so
        return stages + [Stage(None, None, [name], once=False) for name in never]

    def _collect(self, stage: Stage) -> InputHessian:
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

    def _observe(self, stage: Stage, inputs: InputHessian) -> bool:
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
                self.output(module, batch)
        finally:
            handle.remove()
        return seen


def hessian_shape(layer: nn.Module) -> tuple[int, int]:
    """Width of a layer's Hessians, and their number."""
    return weight_shape(layer)[1], layer.groups if isinstance(layer, ConvModule) else 1
