"""Which module or function made each tensor of an example run, and which read it.

Modules of `torch.nn` are seen through hooks, everything between them through a `TorchFunctionMode`: functional ops, operators
such as `+`, and methods. A tensor is told by its identity and version, so that an in-place op makes a new value. No tracing of
the program: what an example does not run is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Value: TypeAlias = tuple[int, int]
"""Identity and version of a tensor of the run."""

_READS_NO_NUMBERS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "data_ptr",
     "is_floating_point", "is_complex", "get_device", "__len__", "__hash__"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module or a function.

    Attributes:
        module: Qualified name of the module; empty for a function.
        function: Name of the function, or class name of the module.
        inputs, outputs: What it read and what it gave.
        shape: Shape of its first output; None if it gave no tensor.
    """

    module: str
    function: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    shape: torch.Size | None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.module or self.function


@dataclass(slots=True)
class Dataflow:
    """The calls of an example run, in their order.

    Attributes:
        calls: Of modules and functions; the last one, named `output`, reads what the model returned.
    """

    calls: list[Call] = field(default_factory=list)

    def of_module(self, name: str) -> list[Call]:
        """Calls of a module."""
        return [call for call in self.calls if call.module == name]

    def producer(self, value: Value) -> Call | None:
        """The call that gave a value; None for what the run was given, and for parameters."""
        return next((call for call in self.calls if value in call.outputs), None)

    def before_change(self, value: Value) -> Call | None:
        """The call that gave the tensor whose numbers were changed in place since, through a view or by index."""
        return next((call for call in self.calls if value[0] in {identity for identity, _ in call.outputs}), None)

    def readers(self, value: Value) -> list[Call]:
        """The calls that read a value, the model's return included."""
        return [call for call in self.calls if value in call.inputs]

    def only_reader(self, call: Call) -> Call | None:
        """The one call that reads the one output of `call`; None if there are several outputs or readers, or none."""
        if len(call.outputs) != 1:
            return None
        readers = self.readers(call.outputs[0])
        return readers[0] if len(readers) == 1 else None


def trace_dataflow(model: nn.Module, run: Callable[[], object]) -> Dataflow:
    """Runs the model once and records its calls.

    Args:
        model: Left as it is; evaluation mode is the caller's.
        run: Runs the model on an example; without gradients.
    """
    recorder = _Recorder()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if _is_leaf(module):
                hook = _ModuleHook(recorder, name, type(module).__name__)
                hooks.callback(module.register_forward_pre_hook(hook.before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(hook.after, with_kwargs=True).remove)
        with torch.no_grad(), recorder:
            result = run()
    recorder.flow.calls.append(Call("", "output", recorder.values(result), (), None))
    return recorder.flow


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested sequences, mappings, and objects that are mappings or dataclasses of such."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors_in(item)


def _is_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and not module._modules


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Dataflow()
        self.inside = 0  # modules that are at work: what they call is theirs
        self._alive: list[Tensor] = []  # so that no identity is used twice

    def values(self, value: object) -> tuple[Value, ...]:
        found = []
        for tensor in tensors_in(value):
            if not isinstance(tensor, nn.Parameter):
                self._alive.append(tensor)
                found.append((id(tensor), tensor._version))
        return tuple(dict.fromkeys(found))

    def record(self, module: str, function: str, inputs: tuple[Value, ...], result: object) -> None:
        outputs = self.values(result)
        if outputs and set(outputs) <= set(inputs):  # gives back what it got, like dropout in evaluation mode
            return
        shape = next((tensor.shape for tensor in tensors_in(result)), None)
        self.flow.calls.append(Call(module, function, inputs, outputs, shape))

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        named = kwargs if isinstance(kwargs, dict) else {}
        if self.inside:
            return func(*args, **named)
        name = getattr(func, "__name__", str(func))
        inputs = self.values((args, named))
        result = func(*args, **named)
        if name not in _READS_NO_NUMBERS and (name != "__get__" or next(tensors_in(result), None) is not None):
            self.record("", name, inputs, result)
        return result


@dataclass(slots=True)
class _ModuleHook:
    recorder: _Recorder
    name: str
    kind: str
    inputs: list[tuple[Value, ...]] = field(default_factory=list)

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.recorder.inside:
            self.inputs.append(self.recorder.values((args, kwargs)))
        self.recorder.inside += 1

    def after(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        self.recorder.inside -= 1
        if not self.recorder.inside:
            self.recorder.record(self.name, self.kind, self.inputs.pop(), output)
