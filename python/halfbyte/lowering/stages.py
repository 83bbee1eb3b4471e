"""Which operations become integer steps, which of them share an epilogue, and in which forms each value is needed.

A *stage* is what one or two steps compute: a product with the addition and activation after it, or one operation. Stages
between the same float parts make one program; `level` counts the float parts before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from halfbyte.lowering.operators import (
    Activate,
    Add,
    AveragePool,
    Concat,
    Context,
    MaxPool,
    Operation,
    Product,
    Relabel,
    Same,
    Select,
    operands,
    parse,
)
from halfbyte.lowering.program import Activation, ActivationKind, Qparams

NO_ACTIVATION = Activation(ActivationKind.NONE)


@dataclass(frozen=True, slots=True)
class Form:
    """How a value lies in memory: codes with `qparams`, or float32; channels last, or contiguous."""

    qparams: Qparams | None
    last: bool


@dataclass(frozen=True, slots=True)
class Epilogue:
    """`activation(x + added)` of a product's result, or of a float value; `x` is None after a product."""

    product: Product | None
    x: Node | None
    added: Node | None
    activation: Activation


@dataclass(slots=True)
class Stage:
    """What is computed together.

    Attributes:
        node: The last of its nodes, which has its value.
        work: The operation.
        last: Whether it is computed channels last.
        level: Of the program it belongs to.
    """

    node: Node
    work: Epilogue | MaxPool | AveragePool | Concat | Select | Same | Relabel
    last: bool
    level: int = 0

    def reads(self) -> tuple[Node, ...]:
        """Tensors it needs, weights left out."""
        if not isinstance(self.work, Epilogue):
            return operands(self.work)
        first = self.work.product.x if self.work.product is not None else self.work.x
        return tuple(node for node in (first, self.work.added) if node is not None)


@dataclass(slots=True)
class Division:
    """A graph divided into stages and what stays float.

    Attributes:
        stages: By the node that has the value, in the graph's order.
        inside: Nodes whose value only their stage sees.
        reasons: Why a node stays float; only nodes that compute tensors.
        levels: Of all nodes; a float node's is that of the first program that may read it.
    """

    stages: dict[Node, Stage] = field(default_factory=dict)
    inside: dict[Node, Stage] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)
    levels: dict[Node, int] = field(default_factory=dict)


def layout(node: Node, context: Context) -> bool | None:
    """Whether the model has the tensor channels last in memory; None if neither that nor contiguous."""
    value: Tensor = node.meta["val"]
    if value.is_contiguous():
        return False
    return True if value.dim() > 2 and value.movedim(1, -1).is_contiguous() else None


def trivial(node: Node, context: Context) -> bool:
    """Whether channels last and contiguous are the same memory."""
    shape = context.shape(node)
    assert shape is not None
    pixels = 1
    for size in shape[1:]:
        pixels *= size
    return len(shape) < 2 or shape[0] == 1 or pixels == 1


def divide(nodes: list[Node], context: Context) -> Division:
    """Divides the graph's nodes, which are in the order in which they are computed."""
    division = Division()
    found: dict[Node, Operation] = {}
    for node in nodes:
        operation = parse(node, context)
        if isinstance(operation, str):
            division.reasons[node] = operation
        else:
            found[node] = operation
    kept = _kept(nodes, found, division.reasons, context)
    for node in nodes:
        if node in kept:
            _add_stage(node, found[node], division, context)
    _set_levels(nodes, division)
    return division


def _kept(
    nodes: list[Node], found: dict[Node, Operation], reasons: dict[Node, str], context: Context
) -> dict[Node, Operation]:
    """The operations between products, and those that a product's epilogue can take."""
    forward: dict[Node, bool] = {}  # whether the value is finite
    for node in nodes:
        if node not in found:
            continue
        operation = found[node]
        inner = [operand in forward for operand in operands(operation)]
        if isinstance(operation, Product):
            forward[node] = True
        elif all(inner) or (isinstance(operation, Add) and any(inner)):
            finite = all(forward.get(operand, False) for operand in operands(operation))
            if isinstance(operation, MaxPool) and not finite:
                reasons[node] = "its input may hold NaN, which codes do not"
            else:
                forward[node] = finite
        else:
            reasons[node] = "nothing before it is an integer"
    kept: dict[Node, Operation] = {}
    for node in reversed(nodes):
        if node not in forward:
            continue
        operation = found[node]
        epilogue = isinstance(operation, Add | Activate) and any(
            len(operand.users) == 1 and isinstance(found.get(operand), Product | Add) and operand in forward
            for operand in operands(operation)
        )
        read = any(user in kept for user in node.users)
        outside = any(user not in kept for user in node.users)
        if outside and layout(node, context) is None:
            reasons[node] = "what reads it is float, and its memory is neither contiguous nor channels last"
        elif isinstance(operation, Product) or epilogue or read:
            kept[node] = operation
        else:
            reasons[node] = "nothing after it is an integer"
    return kept


def _add_stage(node: Node, operation: Operation, division: Division, context: Context) -> None:
    def natural(operand: Node) -> bool | None:
        return division.stages[operand].last if operand in division.stages else None

    def absorb(operand: Node, *, activated: bool) -> Epilogue | None:
        """The epilogue that computes the operand, if this node is all that reads it."""
        stage = division.stages.get(operand)
        if stage is None or not isinstance(stage.work, Epilogue) or len(operand.users) != 1:
            return None
        free = stage.work.activation == NO_ACTIVATION and (activated or stage.work.added is None)
        if not free or (not activated and stage.work.product is None):
            return None
        division.inside[operand] = division.stages.pop(operand)
        return stage.work

    work: Epilogue | MaxPool | AveragePool | Concat | Select | Same | Relabel
    last: bool | None
    if isinstance(operation, Product):
        work, last = Epilogue(operation, None, None, NO_ACTIVATION), not operation.rows
    elif isinstance(operation, Activate):
        last = natural(operation.x)
        inner = absorb(operation.x, activated=True)
        if inner is None:
            work = Epilogue(None, operation.x, None, operation.activation)
        else:
            work = Epilogue(inner.product, inner.x, inner.added, operation.activation)
    elif isinstance(operation, Add):
        order = list(division.stages)  # the operand that is computed later takes the other one
        position = {operand: order.index(operand) for operand in operands(operation) if operand in division.stages}
        later, other = sorted((operation.a, operation.b), key=lambda operand: -position.get(operand, -1))
        last = natural(later)
        inner = None if later is other else absorb(later, activated=False)
        if inner is None and later is not other and natural(other) is not None:
            inner = absorb(other, activated=False)
            later, other = (other, later) if inner is not None else (later, other)
            last = natural(later) if inner is None else division.inside[later].last
        product = None if inner is None else inner.product
        work = Epilogue(product, None if product is not None else later, other, NO_ACTIVATION)
    else:
        work = operation
        if isinstance(operation, Same):
            last = natural(operation.x)
        elif isinstance(operation, Relabel):
            last = operation.last_out
        else:
            last = True
    division.stages[node] = Stage(node, work, bool(last) and not trivial(node, context))


def _set_levels(nodes: list[Node], division: Division) -> None:
    levels = division.levels
    for node in nodes:
        if node in division.inside:
            continue
        stage = division.stages.get(node)
        reads = node.all_input_nodes if stage is None else list(stage.reads())
        before = [levels.get(r, 0) + (stage is None and r in division.stages) for r in reads]
        levels[node] = max(before, default=0)
        if stage is not None:
            stage.level = levels[node]
