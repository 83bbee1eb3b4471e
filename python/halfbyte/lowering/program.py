"""Programs of integer steps: how they are built, where their values lie in memory, and the module that runs one.

A step is a list of fields: numbers, and `Place`s of values. `program_ops.cpp` reads the fields in the order in which the
methods of `ProgramBuilder` write them. All sizes are those of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor, nn

from halfbyte import ops

ALIGNMENT = 64  # of values in the arena, in bytes
_NOWHERE = (-1, 0)


class Step(IntEnum):
    """Kinds of steps, as in `program_ops.cpp`."""

    QUANTIZE = 0
    IMPORT = 1
    CONV = 2
    FINISH = 3
    MAX_POOL = 4
    AVERAGE_POOL = 5
    COPY = 6
    TURN = 7


class ActivationKind(IntEnum):
    """`Activation` of `conv.h`."""

    NONE = 0
    CLAMP = 1
    LEAKY_RELU = 2
    HARDSWISH = 3
    HARDSIGMOID = 4


@dataclass(frozen=True, slots=True)
class Activation:
    """A function that epilogues compute; `low` and `high` bound a clamp, `low` is the slope of a leaky ReLU."""

    kind: ActivationKind = ActivationKind.NONE
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Qparams:
    """Scale and zero point of a whole tensor of signed codes."""

    scale: float
    zero_point: int

    def code(self, value: float) -> int:
        """The code of one number, by the operator that quantizes tensors."""
        scale, zero_point = torch.tensor(self.scale), torch.tensor(self.zero_point, dtype=torch.int32)
        return int(ops.quantize(torch.tensor([value]), scale, zero_point, qmin=-128, qmax=127))


@dataclass(eq=False, slots=True)
class Value:
    """Memory that steps write and read: `size` bytes a sample, in the arena or, with `output`, in a result."""

    size: int
    output: int | None = None
    first: int = -1  # step that writes it
    last: int = -1  # step that reads it last
    offset: int = -1


@dataclass(frozen=True, slots=True)
class Window:
    """Sizes along depth, height and width of a convolution, or of pooling windows; padding is that in front."""

    size_in: tuple[int, int, int]
    size_out: tuple[int, int, int]
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)

    def fields(self) -> list[int]:
        """As steps hold them."""
        return [*self.size_in, *self.size_out, *self.kernel, *self.stride, *self.padding, *self.dilation]


@dataclass(slots=True, kw_only=True)
class Results:
    """What an epilogue stores, and what it does before.

    Attributes:
        codes, floats: Where codes and floats go; either or both.
        qparams: Of the codes.
        code_range: Smallest and largest code.
        added: Floats that are added first.
        activation: Applied after that.
        code_stride, code_shift: Codes from one pixel to the next if not the channels, and those left out in front.
    """

    codes: Value | None = None
    floats: Value | None = None
    qparams: Qparams = Qparams(1.0, 0)
    code_range: tuple[int, int] = (-128, 127)
    added: Value | None = None
    activation: Activation = Activation()
    code_stride: int | None = None
    code_shift: int = 0


Field = int | float | tuple[Value | None, bool]


@dataclass
class ProgramBuilder:
    """Collects steps."""

    steps: list[list[Field]] = field(default_factory=list)
    constants: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def value(self, size: int) -> Value:
        """Memory in the arena, `size` bytes a sample."""
        return Value(size)

    def output(self, sizes: Sequence[int], channels_last: bool) -> None:
        """Declares a float32 result of `sizes` a sample."""
        self.outputs += [int(channels_last), len(sizes), *sizes]

    def constant(self, name: str, tensor: Tensor | None) -> int:
        """Index of a tensor among the constants; -1 for None."""
        if tensor is None:
            return -1
        for index, (_, known) in enumerate(self.constants):
            if known is tensor:
                return index
        self.constants.append((name, tensor))
        return len(self.constants) - 1

    def _add(self, *fields: Field) -> None:
        index = len(self.steps)
        for entry in fields:
            value, written = entry if isinstance(entry, tuple) else (None, False)
            if value is not None:
                if value.first < 0:
                    assert written
                    value.first = index
                value.last = index
        self.steps.append(list(fields))

    def quantize(self, index: int, rows: bool, channels: int, pixels: int, codes: Value, qparams: Qparams) -> None:
        """Codes of an input, channels last in memory or (`rows`) as it is."""
        self._add(
            Step.QUANTIZE, int(rows), channels, pixels, index, (codes, True), qparams.zero_point, float(qparams.scale)
        )

    def load(self, index: int, rows: bool, channels: int, pixels: int, floats: Value) -> None:
        """An input as floats, in the same layouts."""
        self._add(Step.IMPORT, int(rows), channels, pixels, index, (floats, True))

    def conv(
        self,
        x: Value,
        qparams: Qparams,
        channels: tuple[int, int],
        groups: int,
        window: Window,
        transposed: bool,
        weight: tuple[int, int],
        constants: Sequence[int],
        results: Results,
    ) -> None:
        """A convolution of codes; `weight` is bits and group size, `constants` qweight, scale, zero point and bias."""
        fields: list[Field] = [Step.CONV, *channels, groups, *window.fields(), int(transposed), (x, False)]
        fields += [float(qparams.scale), qparams.zero_point, *weight, *constants]
        self._add(*fields, *_results(results, channels[1]))

    def finish(self, x: Value, channels: int, pixels: int, results: Results) -> None:
        """An epilogue over floats."""
        self._add(Step.FINISH, channels, pixels, (x, False), *_results(results, channels))

    def max_pool(self, x: Value, y: Value, floats: bool, channels: int, window: Window) -> None:
        """Largest of each window."""
        self._add(Step.MAX_POOL, int(floats), channels, *window.fields(), (x, False), (y, True))

    def average_pool(self, x: Value, y: Value, channels: int, window: Window, divisor: int) -> None:
        """Mean of each window of floats; `divisor` is the constant that holds the divisor of each output pixel."""
        self._add(Step.AVERAGE_POOL, channels, *window.fields(), (x, False), (y, True), divisor)

    def copy(
        self,
        x: Value,
        y: Value,
        window: Window,
        sources: int,
        strides: tuple[int, int],
        count: int,
        shifts: tuple[int, int] = (0, 0),
        fill: int = 0,
    ) -> None:
        """`count` bytes of each output pixel from the input pixel that the constant `sources` names, -1 for `fill`."""
        fields: list[Field] = [Step.COPY, *window.size_in, *window.size_out, sources, *strides, count, *shifts, fill]
        self._add(*fields, (x, False), (y, True))

    def turn(self, x: Value, y: Value, floats: bool, channels: int, pixels: int) -> None:
        """`[pixels, channels]` to `[channels, pixels]`."""
        self._add(Step.TURN, int(floats), channels, pixels, (x, False), (y, True))

    def build(self) -> Program:
        """The module."""
        arena = _plan([value for value in self._values() if value.output is None])
        steps: list[int] = []
        numbers: list[float] = []
        for step in self.steps:
            for entry in step:
                if isinstance(entry, tuple):
                    steps += _place(entry[0])
                elif isinstance(entry, float):
                    numbers.append(entry)
                else:
                    steps.append(int(entry))
        return Program(self.constants, steps, numbers, arena, self.outputs)

    def _values(self) -> list[Value]:
        found = {id(e[0]): e[0] for step in self.steps for e in step if isinstance(e, tuple) and e[0] is not None}
        return list(found.values())


def _results(results: Results, channels: int) -> list[Field]:
    stride = channels if results.code_stride is None else results.code_stride
    low, high = results.code_range
    return [
        stride,
        results.code_shift,
        (results.codes, True),
        (results.floats, True),
        (results.added, False),
        float(results.qparams.scale),
        results.qparams.zero_point,
        low,
        high,
        int(results.activation.kind),
        float(results.activation.low),
        float(results.activation.high),
    ]


def _place(value: Value | None) -> tuple[int, int]:
    if value is None:
        return _NOWHERE
    return (0, value.offset) if value.output is None else (1, value.output)


def _plan(values: list[Value]) -> int:
    """Gives every value an offset at which no other lies while it is needed; large ones first. Returns the bytes."""
    placed: list[Value] = []
    for value in sorted(values, key=lambda v: (-v.size, v.first)):
        busy = sorted(
            (other for other in placed if other.first <= value.last and value.first <= other.last),
            key=lambda other: other.offset,
        )
        offset = 0
        for other in busy:
            if offset + value.size <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.size) // ALIGNMENT) * ALIGNMENT)
        value.offset = offset
        placed.append(value)
    return max((-(-(v.offset + v.size) // ALIGNMENT) * ALIGNMENT for v in placed), default=0)


class Program(nn.Module):
    """The integer part of a lowered model between two float parts: weights it shares with the model, and steps.

    Args:
        constants: Names and tensors: weights, qparams, biases, tables.
        steps, numbers, arena, outputs: As in `hb.ops.run_program`.
    """

    steps: Tensor
    numbers: Tensor

    def __init__(
        self,
        constants: Sequence[tuple[str, Tensor]],
        steps: Sequence[int],
        numbers: Sequence[float],
        arena: int,
        outputs: Sequence[int],
    ) -> None:
        super().__init__()
        self._names: list[str] = []
        for index, (name, tensor) in enumerate(constants):
            self._names.append(f"{index}_{name.replace('.', '_')}")
            self.register_buffer(self._names[-1], tensor.detach())
        self.register_buffer("steps", torch.tensor(steps, dtype=torch.int64))
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.float32))
        self.arena, self.outputs = arena, list(outputs)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Results of the program for a batch."""
        buffers = self._buffers
        constants = [buffers[name] for name in self._names]
        return ops.run_program(
            list(inputs),
            constants,  # type: ignore[arg-type]
            self.steps,
            self.numbers,
            arena=self.arena,
            outputs=self.outputs,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old
        return self

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{len(self._names)} constants, {self.arena} bytes a sample"
