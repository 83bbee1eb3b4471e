"""What `lower` knows of operators: each one that integers can pass as a small record, or the reason why not.

An operator is here only if the codes of its result follow exactly from codes or float32 results of its operands: it moves
values, is monotonic, or is computed in an epilogue in torch's own order of operations. Sums over pixels, sigmoids and the
like stay torch's: their last bits depend on torch's kernels and on where a value lies in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from halfbyte.lowering.program import Activation, ActivationKind, Qparams, Window

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Product:
    """A convolution or linear layer with static INT8 inputs; `rows` if inputs are the last dimension."""

    x: Node
    qparams: Qparams
    constants: tuple[Node | None, ...]  # qweight, scale, zero point, bias
    channels: tuple[int, int]
    groups: int
    window: Window
    transposed: bool
    bits: int
    group_size: int
    rows: bool


@dataclass(frozen=True, slots=True)
class Add:
    """Sum of two tensors of one shape."""

    a: Node
    b: Node


@dataclass(frozen=True, slots=True)
class Activate:
    """A function of each element."""

    x: Node
    activation: Activation


@dataclass(frozen=True, slots=True)
class Same:
    """Gives its operand."""

    x: Node


@dataclass(frozen=True, slots=True)
class Relabel:
    """Other sizes for the same memory; whether operand and result are channels last in it."""

    x: Node
    last_in: bool
    last_out: bool


@dataclass(frozen=True, slots=True)
class MaxPool:
    """Maxima over windows."""

    x: Node
    channels: int
    window: Window


@dataclass(frozen=True, slots=True)
class AveragePool:
    """Means over windows, in torch's order; the divisor of each output pixel."""

    x: Node
    channels: int
    window: Window
    divisors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Channels of several tensors, one after another."""

    xs: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """Every result element is one of the operand's or 0: slices, padding, nearest interpolation.

    Attributes:
        sources: Source of each index along depth, height and width; -1 for 0.
        channels: First channel that is read, first that is written, how many, and how many the result has.
    """

    x: Node
    window: Window
    sources: tuple[int, ...]
    channels: tuple[int, int, int, int]


Operation = Product | Add | Activate | Same | Relabel | MaxPool | AveragePool | Concat | Select


def operands(operation: Operation) -> tuple[Node, ...]:
    """The tensors an operation reads, weights left out."""
    if isinstance(operation, Add):
        return operation.a, operation.b
    return operation.xs if isinstance(operation, Concat) else (operation.x,)


@dataclass(frozen=True, slots=True)
class Context:
    """The captured graph's batch size (an integer or a symbolic expression) and its weights."""

    batch: object
    constants: dict[Node, tuple[str, Tensor]]

    def shape(self, node: object) -> tuple[int, ...] | None:
        """Sizes of a sample of a float32 tensor whose first dimension is the batch; else None."""
        value = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(value, Tensor) or value.dtype is not torch.float32 or value.dim() == 0:
            return None
        if size_of(value.shape[0]) != self.batch or not all(isinstance(size, int) for size in value.shape[1:]):
            return None
        return tuple(value.shape[1:])


def size_of(size: int | torch.SymInt) -> object:
    """A size that can be compared: an integer or an expression."""
    return size if isinstance(size, int) else size.node.expr


def parse(node: Node, context: Context) -> Operation | str:
    """The operation of a node, or why integers do not pass it."""
    parser = _PARSERS.get(node.target)
    if parser is None:
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        return _UNKNOWN.get(name, "no integer form")
    if context.shape(node) is None:
        return "its result is not float32 with the batch first and other sizes fixed"
    found = parser(node, context)
    if isinstance(found, str):
        return found
    if any(context.shape(operand) is None for operand in operands(found)):
        return "an operand is not float32 with the batch first and other sizes fixed"
    return found


def sizes3(sizes: Sequence[int], filler: int = 1) -> tuple[int, int, int]:
    """One to three sizes as depth, height and width."""
    filled = (*(filler,) * (3 - len(sizes)), *sizes)
    return filled[0], filled[1], filled[2]


def _conv(node: Node, context: Context) -> Operation | str:
    x, qweight, scale, zero, bias, bits, out_channels, group_size, kernel, stride, padding, dilation = node.args[:12]
    _, groups, transposed, act_scale, act_zero, out_scale = node.args[12:18]
    shape, out = context.shape(x), context.shape(node)
    if shape is None or out is None:
        return "its input is not float32 with the batch first and other sizes fixed"
    qparams = _qparams(act_scale, act_zero, context)
    constants = _constants((qweight, scale, zero, bias), context)
    if qparams is None or constants is None or out_scale is not None:
        return "activations have no static scale"
    window = Window(
        sizes3(shape[1:]),
        sizes3(out[1:]),
        sizes3(kernel),  # type: ignore[arg-type]
        sizes3(stride),  # type: ignore[arg-type]
        sizes3(padding[: len(kernel)], 0),  # type: ignore[arg-type,index]
        sizes3(dilation),  # type: ignore[arg-type]
    )
    channels = (shape[0], out_channels)
    return Product(x, qparams, constants, channels, groups, window, transposed, bits, group_size, rows=False)  # type: ignore[arg-type]


def _linear(node: Node, context: Context) -> Operation | str:
    x, qweight, scale, zero, bias, bits, out_features, group_size, act_scale, act_zero = node.args[:10]
    shape = context.shape(x)
    if shape is None or not shape:
        return "its input is not float32 with the batch first and other sizes fixed"
    qparams = _qparams(act_scale, act_zero, context)
    constants = _constants((qweight, scale, zero, bias), context)
    if qparams is None or constants is None:
        return "activations have no static scale"
    pixels = (1, 1, prod(shape[:-1]))
    channels = (shape[-1], out_features)
    return Product(x, qparams, constants, channels, 1, Window(pixels, pixels), False, bits, group_size, rows=True)  # type: ignore[arg-type]


def _qparams(scale: object, zero_point: object, context: Context) -> Qparams | None:
    if not isinstance(scale, Node) or scale not in context.constants:
        return None
    zero = 0
    if isinstance(zero_point, Node):
        if zero_point not in context.constants:
            return None
        zero = int(context.constants[zero_point][1])
    return Qparams(float(context.constants[scale][1]), zero)


def _constants(nodes: Sequence[object], context: Context) -> tuple[Node | None, ...] | None:
    if any(node is not None and node not in context.constants for node in nodes):
        return None
    return tuple(nodes)  # type: ignore[arg-type]


def _add(node: Node, context: Context) -> Operation | str:
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or context.shape(a) != context.shape(b):
        return "its operands are not two tensors of one shape"
    if node.kwargs.get("alpha", 1) != 1:
        return f"alpha={node.kwargs['alpha']}"
    return Add(a, b)


def _argument(node: Node, index: int, name: str, default: object) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _clamp(low: float | None, high: float | None, names: tuple[str, str] = ("min", "max")) -> _Parser:
    def parser(node: Node, context: Context) -> Operation | str:
        bounds = [_argument(node, 1, names[0], low), _argument(node, 2, names[1], high)]
        if any(isinstance(bound, Node) for bound in bounds):
            return "its bounds are tensors"
        lowest, highest = (
            end if bound is None else float(bound)  # type: ignore[arg-type]
            for bound, end in zip(bounds, (-math.inf, math.inf), strict=True)
        )
        return Activate(node.args[0], Activation(ActivationKind.CLAMP, lowest, highest))  # type: ignore[arg-type]

    return parser


def _leaky_relu(node: Node, context: Context) -> Operation | str:
    slope = float(_argument(node, 1, "negative_slope", 0.01))  # type: ignore[arg-type]
    if not 0 <= slope <= 1:
        return f"negative_slope={slope} is not in [0, 1]"
    return Activate(node.args[0], Activation(ActivationKind.LEAKY_RELU, slope))  # type: ignore[arg-type]


def _plain(kind: ActivationKind) -> _Parser:
    return lambda node, context: Activate(node.args[0], Activation(kind))  # type: ignore[arg-type]


def _same(node: Node, context: Context) -> Operation | str:
    return Same(node.args[0])  # type: ignore[arg-type]


def _dropout(node: Node, context: Context) -> Operation | str:
    return "dropout in training mode" if node.args[2] else Same(node.args[0])  # type: ignore[arg-type]


def _view(node: Node, context: Context) -> Operation | str:
    x = node.args[0]
    shape = context.shape(x)
    if shape is None or prod(shape) != prod(context.shape(node) or ()):
        return "it mixes samples"
    return Relabel(x, False, False)  # type: ignore[arg-type]


def _permute(node: Node, context: Context) -> Operation | str:
    x = node.args[0]
    shape = context.shape(x)
    if shape is None:
        return "its input is not float32 with the batch first and other sizes fixed"
    dims = len(shape) + 1
    order = list(range(dims))
    if node.target is aten.transpose.int:
        a, b = (_number(d) % dims for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = [_number(d) % dims for d in _list(node.args[1])]
    if order == [0, *range(2, dims), 1]:
        return Relabel(x, True, False)  # type: ignore[arg-type]
    if order == [0, dims - 1, *range(1, dims - 1)]:
        return Relabel(x, False, True)  # type: ignore[arg-type]
    return f"it orders dimensions as {order}, not channels first as channels last or back"


def _number(argument: object) -> int:
    assert isinstance(argument, int)
    return argument


def _list(argument: object) -> list[object]:
    assert isinstance(argument, list | tuple)
    return list(argument)


def _spatial(value: object, dims: int) -> tuple[int, int, int] | None:
    """A pooling argument along three dimensions."""
    values = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return sizes3(values * dims if len(values) == 1 else values)


def _pool_window(node: Node, context: Context, *, dilated: bool) -> tuple[int, Window] | str:
    shape, out = context.shape(node.args[0]), context.shape(node)
    if shape is None or out is None or not 2 <= len(shape) <= 4:
        return "its input is not float32 with the batch first and other sizes fixed"
    dims = len(shape) - 1
    kernel = _spatial(node.args[1], dims)
    stride = _argument(node, 2, "stride", [])
    padding = _spatial(_argument(node, 3, "padding", 0), dims)
    dilation = _spatial(_argument(node, 4, "dilation", 1), dims) if dilated else (1, 1, 1)
    assert kernel is not None and padding is not None and dilation is not None
    padding = sizes3(padding[3 - dims :], 0)
    strides = _spatial(stride, dims) if stride else kernel
    assert strides is not None
    window = Window(sizes3(shape[1:]), sizes3(out[1:]), kernel, strides, padding, dilation)
    return shape[0], window


def _max_pool(node: Node, context: Context) -> Operation | str:
    found = _pool_window(node, context, dilated=True)
    return found if isinstance(found, str) else MaxPool(node.args[0], *found)  # type: ignore[arg-type]


def _average_pool(node: Node, context: Context) -> Operation | str:
    found = _pool_window(node, context, dilated=False)
    if isinstance(found, str):
        return found
    channels, w = found
    include_pad = bool(_argument(node, 5, "count_include_pad", True))
    override = _argument(node, 6, "divisor_override", None)
    lengths = []
    for d in range(3):
        starts = [o * w.stride[d] - w.padding[d] for o in range(w.size_out[d])]
        ends = [min(s + w.kernel[d], w.size_in[d] + w.padding[d]) for s in starts]
        if not include_pad:
            starts, ends = [max(s, 0) for s in starts], [min(e, w.size_in[d]) for e in ends]
        lengths.append([e - s for s, e in zip(starts, ends, strict=True)])
    divisors = [float(a * b * c) for a in lengths[0] for b in lengths[1] for c in lengths[2]]
    if override is not None:
        divisors = [float(override)] * len(divisors)  # type: ignore[arg-type]
    return AveragePool(node.args[0], channels, w, tuple(divisors))  # type: ignore[arg-type]


def _concat(node: Node, context: Context) -> Operation | str:
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    if not all(isinstance(x, Node) for x in tensors):
        return "an operand is no tensor"
    shapes = [context.shape(x) for x in tensors]
    dim = int(_argument(node, 1, "dim", 0))  # type: ignore[call-overload]
    if any(shape is None or not shape for shape in shapes) or dim % (len(shapes[0] or ()) + 1) != 1:
        return "it does not join channels"
    return Concat(tuple(tensors))  # type: ignore[arg-type]


def _select(node: Node, context: Context) -> Operation | str:
    """Finds the sources by running the operator on indices."""
    x = node.args[0]
    shape, out = context.shape(x), context.shape(node)
    if shape is None or out is None or not 1 <= len(shape) <= 4 or len(out) != len(shape):
        return "its input is not float32 with the batch first and other sizes fixed"
    if node.target is aten.slice.Tensor and _argument(node, 1, "dim", 0) == 0:
        whole = not _argument(node, 2, "start", 0) and _argument(node, 4, "step", 1) == 1 and shape == out
        return Same(x) if whole else "it selects samples"  # type: ignore[arg-type]
    if any(isinstance(a, Node) for a in (*node.args[1:], *node.kwargs.values())):
        return "its sizes depend on the input"
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        position = 3 if node.target is aten.pad.default else 2
        mode = _argument(node, 2, "mode", "constant") if position == 3 else "constant"
        if mode != "constant" or _argument(node, position, "value", 0) not in (None, 0, 0.0):
            return "it does not pad with zeros"
    tables = []
    for d, size in enumerate(shape):
        index = torch.arange(1.0, size + 1).view(1, *(size if e == d else 1 for e in range(len(shape))))
        moved = node.target(index.expand(1, *shape).contiguous(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
        if tuple(moved.shape[1:]) != out:
            return "its sizes depend on the batch"
        tables.append([int(i) - 1 for i in moved[0].movedim(d, 0).reshape(out[d], -1).amax(1)])
    read = [(to, source) for to, source in enumerate(tables[0]) if source >= 0]
    if not read or [s - t for t, s in read] != [read[0][1] - read[0][0]] * len(read):
        return "it takes channels apart"
    spatial = [[0]] * (4 - len(shape)) + tables[1:]
    window = Window(sizes3(shape[1:]), sizes3(out[1:]))
    sources = tuple(source for table in spatial for source in table)
    return Select(x, window, sources, (read[0][1], read[0][0], len(read), out[0]))  # type: ignore[arg-type]


_Parser = Callable[[Node, Context], "Operation | str"]
_PARSERS: dict[object, _Parser] = {
    torch.ops.halfbyte.conv_int8.default: _conv,
    torch.ops.halfbyte.linear_int8.default: _linear,
    aten.add.Tensor: _add,
    aten.relu.default: _clamp(0.0, None, ("", "")),
    aten.relu6.default: _clamp(0.0, 6.0, ("", "")),
    aten.hardtanh.default: _clamp(-1.0, 1.0, ("min_val", "max_val")),
    aten.clamp.default: _clamp(None, None),
    aten.clamp_min.default: _clamp(None, None),
    aten.leaky_relu.default: _leaky_relu,
    aten.hardswish.default: _plain(ActivationKind.HARDSWISH),
    aten.hardsigmoid.default: _plain(ActivationKind.HARDSIGMOID),
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.unsqueeze.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.max_pool1d.default: _max_pool,
    aten.max_pool2d.default: _max_pool,
    aten.max_pool3d.default: _max_pool,
    aten.avg_pool1d.default: _average_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.cat.default: _concat,
    aten.slice.Tensor: _select,
    aten.pad.default: _select,
    aten.constant_pad_nd.default: _select,
    aten.upsample_nearest1d.vec: _select,
    aten.upsample_nearest2d.vec: _select,
    aten.upsample_nearest3d.vec: _select,
}
_SUM = "sums pixels, in an order that is torch's own"
_CURVE = "its last bits are torch's own and depend on where a value lies in memory"
_UNKNOWN = {
    "aten::mean": _SUM,
    "aten::adaptive_avg_pool1d": _SUM,
    "aten::adaptive_avg_pool2d": _SUM,
    "aten::adaptive_avg_pool3d": _SUM,
    "aten::avg_pool3d": _SUM,
    "aten::sigmoid": _CURVE,
    "aten::silu": _CURVE,
    "aten::gelu": _CURVE,
    "aten::tanh": _CURVE,
    "aten::mish": _CURVE,
    "aten::softmax": _CURVE,
}
