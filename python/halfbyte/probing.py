"""Finding folds by probing an example run; nothing is known here about architectures.

Each producer's channels are multiplied by powers of two, which floating point does exactly, while every linear layer still
gives what it gave before. If all that changes are inputs of linear layers, each column by one power of two, then these layers
are the consumers, and the powers say which channel each column reads. Whatever else reads the producer (a residual
connection, an activation, a table that shares a weight) shows as a change that is none of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfbyte.flow import find_blocks
from halfbyte.folds import Consumer, Example, Fold, NoFold, relative_change
from halfbyte.outputs import output_tensors
from halfbyte.targets import is_target

_DIGIT_BITS = 3
_POWERS = torch.arange(-4.0, 4.0).exp2()  # by digit: kept near 1, so that float16 neither overflows nor loses bits
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def find_folds(model: nn.Module, run: Callable[[], object]) -> tuple[list[Fold], list[NoFold]]:
    """Probes every linear layer and every module with gains for a fold.

    Args:
        model: In evaluation mode; left as it is.
        run: Runs the model on a small example, without gradients, always the same.

    Returns:
        The folds, in the order in which producers first run; and the modules that gain vectors but cannot be scaled.

    Raises:
        QuantizationError: NaN or inf in the model's outputs.
    """
    trace = _Trace(model, run)
    folds: list[Fold] = []
    failed: list[NoFold] = []
    for name in trace.order:
        try:
            folds.append(trace.fold(name))
        except _Unscalable as error:
            failed.append(NoFold(name, str(error)))
    return folds, failed


class _Unscalable(Exception):
    """Says why a producer cannot be scaled; also ends a probing run."""


@dataclass(slots=True)
class _Runs:
    """What a linear layer got and gave, one entry a call."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    source: str = ""


class _Trace:
    """One run of the model, kept so that it can be run again with linear layers that repeat what they gave."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        self.model, self.run = model, run
        self.modules = dict(model.named_modules())
        self.linear = linear_layers(model)
        self.names = {id(module): name for name, module in self.linear.items()}
        self.blocks = find_blocks(model, list(self.linear))
        self.runs: dict[str, _Runs] = {}
        self.offsets: dict[str, dict[str, float]] = {}
        self.order: list[str] = []
        self.owners: dict[tuple[int, int], set[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault((parameter.data_ptr(), parameter.numel()), set()).add(name)
        self._record()

    def _record(self) -> None:
        sources: list[tuple[Tensor, str]] = []  # keeps the tensors, so that no other takes the id of one

        def record(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            output = type(module).forward(module, x)
            if name not in self.runs:
                source = next((n for tensor, n in sources if tensor is x), name)
                self.runs[name] = _Runs(source=source)
                self.order.append(name)
                sources.append((x, name))
            runs = self.runs[name]
            runs.inputs.append(x.detach().clone())
            runs.outputs.append(output.detach().clone())
            return output

        def gain(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
                if name not in self.offsets:
                    self.offsets[name] = {}  # the trial below runs this hook too
                    self.offsets[name] = _gain_offsets(module, args, kwargs, output)
                    if self.offsets[name]:
                        self.order.append(name)

            return hook

        handles = [
            module.register_forward_hook(gain(name), with_kwargs=True)
            for name, module in self.modules.items()
            if name not in self.linear and _may_have_gains(module)
        ]
        try:
            with replaced_forward(self.linear, record):
                self.outputs = Example(self.run).outputs
        finally:
            for handle in handles:
                handle.remove()

    def fold(self, name: str) -> Fold:
        """The fold of one producer.

        Raises:
            _Unscalable: there is none.
        """
        module = self.modules[name]
        offsets = self.offsets.get(name) or {key: 0.0 for key, p in module._parameters.items() if p is not None}
        self._check_alone(name, offsets)
        channels = next(p.shape[0] for p in module._parameters.values() if p is not None)
        digits = max(1, -(-(channels - 1).bit_length() // _DIGIT_BITS))
        found: dict[str, Tensor] = {}
        known: dict[str, Tensor] = {}
        for digit in range(digits):
            values = (torch.arange(channels) >> (_DIGIT_BITS * digit)) & (len(_POWERS) - 1)
            for consumer, (read, seen) in self._probe(name, values).items():
                found.setdefault(consumer, torch.zeros_like(read)).add_(read << (_DIGIT_BITS * digit))
                known[consumer] = seen
            if not found:
                raise _Unscalable("no linear layer reads it")
        consumers = []
        for consumer in sorted(found, key=self.order.index):
            self._check_alone(consumer, ("weight",))
            channel_of = _complete(found[consumer], known[consumer], channels, consumer)
            source = self.runs[consumer].source
            consumers.append(Consumer(consumer, channel_of, source if source in found else consumer))
        self._check_unseen(name, consumers)
        return Fold(name, channels, tuple(consumers), offsets)

    def _check_alone(self, name: str, parameters: Sequence[str] | dict[str, float]) -> None:
        """Raises if a parameter is not the module's own, or none at all."""
        if parametrize.is_parametrized(self.modules[name]) or not parameters:
            raise _Unscalable(f"the weight of {name} is not a plain parameter")
        for key in parameters:
            parameter = self.modules[name]._parameters.get(key)
            if parameter is None:
                raise _Unscalable(f"the {key} of {name} is not a parameter")
            others = self.owners[parameter.data_ptr(), parameter.numel()] - {name}
            if others:
                raise _Unscalable(f"the {key} of {name} is shared with {', '.join(sorted(others))}")

    def _check_unseen(self, producer: str, consumers: Sequence[Consumer]) -> None:
        """Raises if a layer that did not run on the example, such as an expert, might read the same channels."""
        block = next((b + "." for b in self.blocks if producer.startswith(b + ".")), "")
        widths = {len(consumer.channel_of) for consumer in consumers}
        unseen = [
            n for n, m in self.linear.items() if n not in self.runs and n.startswith(block) and m.in_features in widths
        ]
        if unseen:
            raise _Unscalable(f"{unseen[0]}, which may read it, did not run on the example")

    def _probe(self, producer: str, digits: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Runs with the producer's channels times `_POWERS[digits]`: by consumer, the digit that each column shows.

        The second tensor says where the example had anything but zeros to show it.
        """
        calls: dict[str, int] = {}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        untouched: set[str] = set()  # by at least one call
        factor = _POWERS[digits]

        def replay(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            call = calls[name] = calls.get(name, -1) + 1
            runs = self.runs.get(name)
            if runs is None or call >= len(runs.inputs):
                raise _Unscalable(f"it decides whether {name} runs")
            if x.shape != runs.inputs[call].shape:
                raise _Unscalable(f"it changes the shape of what {name} gets")
            if not torch.equal(x, runs.inputs[call]):
                read = _digits_read(x, runs.inputs[call])
                if read is None:
                    raise _Unscalable(f"{name} reads it through something that does not scale with it")
                found[name] = _merge(found.get(name), read, name)
            elif bool(x.any()):
                untouched.add(name)
            output = runs.outputs[call].clone()
            return output * factor.to(output.dtype) if name == producer else output

        def scale(module: nn.Module, args: tuple[object, ...], output: object) -> object:
            return output * factor.to(output.dtype) if isinstance(output, Tensor) else output

        handle = None if producer in self.linear else self.modules[producer].register_forward_hook(scale)
        try:
            with replaced_forward(self.linear, replay):
                outputs = output_tensors(self.run())
        finally:
            if handle is not None:
                handle.remove()
        for name, old in self.outputs.items():
            if name not in outputs or relative_change(outputs[name], old) > _TOLERANCE.get(old.dtype, 1e-5):
                raise _Unscalable("the model's output reads it past linear layers")
        for name in found:
            if name in untouched:
                raise _Unscalable(f"{name} reads it only some of the times it runs")
            if calls[name] + 1 != len(self.runs[name].inputs):
                raise _Unscalable(f"it decides how often {name} runs")
        return found


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name, subclasses with a forward of their own left out."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_target(m)}


@contextmanager
def replaced_forward(
    modules: dict[str, nn.Linear], forward: Callable[[str, nn.Linear, Tensor], Tensor]
) -> Iterator[None]:
    """Has every module call `forward(name, module, input)` in place of its own."""

    def bound(name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda input: forward(name, module, input)

    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = bound(name, module)
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


def _may_have_gains(module: nn.Module) -> bool:
    """Whether all parameters of a module are vectors of one size, and it has no children with parameters."""
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and all(p.dim() == 1 and p.shape == own[0].shape for p in own) and not list(module.children())


def _gain_offsets(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
) -> dict[str, float]:
    """What to add to each parameter so that scaling all of them scales the output; empty if that does not scale it."""
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    channels = len(next(iter(own.values())))
    if not isinstance(output, Tensor) or output.shape[-1:] != (channels,) or not output.is_floating_point():
        return {}
    scale = _POWERS[torch.arange(channels) % len(_POWERS)].to(output.dtype)
    for stored_less_one in (0.0, 1.0):
        offsets = dict.fromkeys(own, 0.0) | {next(iter(own)): stored_less_one}
        scaled = {name: (p + offsets[name]) * scale.to(p.dtype) - offsets[name] for name, p in own.items()}
        with suppress(RuntimeError):
            new = torch.func.functional_call(module, scaled, args, kwargs)
            if isinstance(new, Tensor) and relative_change(new, output * scale) <= _TOLERANCE.get(output.dtype, 1e-5):
                return offsets
    return {}


def _digits_read(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor] | None:
    """The digit by whose power each column of `x` differs from `reference`, and where it shows; None if it is no power."""
    new, old = (t.detach().reshape(-1, t.shape[-1]).float() for t in (x, reference))
    size = old.abs().amax(dim=0)
    seen = size > 0
    power = torch.where(seen, new.abs().amax(dim=0) / size.clamp(min=1e-38), 1.0)
    digit = (power.clamp(min=1e-38).log2().round() + len(_POWERS) // 2).long()
    if bool(((digit < 0) | (digit >= len(_POWERS))).any()):
        return None
    factor = torch.where(seen, _POWERS[digit], 1.0)
    error = (new - old * factor).abs().amax(dim=0)
    if bool((error > _TOLERANCE.get(x.dtype, 1e-5) * size * factor).any()):
        return None
    return torch.where(seen, digit, 0), seen


def _merge(before: tuple[Tensor, Tensor] | None, read: tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Joins what two calls of one layer show."""
    if before is None:
        return read
    both = before[1] & read[1]
    if bool((before[0] != read[0])[both].any()):
        raise _Unscalable(f"{name} reads other channels each time it runs")
    return torch.where(before[1], before[0], read[0]), before[1] | read[1]


def _complete(channel_of: Tensor, seen: Tensor, channels: int, name: str) -> Tensor:
    """Fills in the channels of columns that were zero all over the example: the simple layout that the others follow."""
    if bool((channel_of[seen] >= channels).any()):
        raise _Unscalable(f"{name} mixes its channels")
    if bool(seen.all()):
        return channel_of
    columns = torch.arange(len(channel_of))
    for size in range(channels, 0, -1):  # channels repeated in runs of `size`: all at once, or head by head
        if len(channel_of) % channels or channels % size:
            continue
        repeats = len(channel_of) // channels
        layout = columns // (size * repeats) * size + columns % size
        if torch.equal(layout[seen], channel_of[seen]):
            return layout
    raise _Unscalable(f"{int((~seen).sum())} inputs of {name} are zero all over the example")
