"""`hb.lower`: integers stay integers between the layers of a converted model."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from halfbyte.calibration import run_batch
from halfbyte.errors import QuantizationError, VerificationError
from halfbyte.lowering.capture import Capture, arguments_of, capture, check_model
from halfbyte.lowering.emission import Emission
from halfbyte.lowering.model import InputSpec, LoweredModel, LoweredNode, LoweringReport
from halfbyte.lowering.stages import Division, divide, layout

_CHECKS = ("_assert", "sym_constrain")  # operators that torch.export adds to check sizes


def lower(model: nn.Module, example_inputs: object, *, dynamic_batch: bool = True) -> LoweredModel:
    """A copy of a converted model in which integers stay integers between layers; its outputs are equal bit for bit.

    The model's graph comes from `torch.export`. Where a static INT8 layer feeds another one through operators that integers can
    pass (activations, residual additions, maxima, concatenation, padding, reshaping ...), the first layer's epilogue computes
    them and quantizes to the scale of the second, and no float tensor exists between them. All layers between two operators
    that stay float run in one call. What stays float, and why, is in `.report`.

    Args:
        model: A model that `hb.quantize_(model, hb.int8_static(), data)` or `hb.convert_` made, in evaluation mode. It is not
            changed, and the result shares its weights.
        example_inputs: A batch: a tensor, a tuple of positional or a dict of keyword arguments. Sizes, dtypes and (for float
            operators) the memory layout of inputs are those of the example from then on.
        dynamic_batch: Leave the first dimension of all inputs that have the example's batch size free.

    Returns:
        A module with the same arguments and results.

    Raises:
        TypeError: The model is no module, or the example no batch.
        QuantizationError: The model is not converted, in training mode or not on the CPU; the example does not fit it; or
            `torch.export` cannot trace it.
        VerificationError: The result differs from the model on the example: a bug of halfbyte.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> images = torch.randn(4, 3, 8, 8)
        >>> _ = hb.quantize_(model, hb.int8_static(), [images], progress=False)
        >>> fast = hb.lower(model, images)
        >>> torch.equal(fast(images[:2]), model(images[:2]))
        True
    """
    check_model(model)
    arguments_of(example_inputs)
    try:
        with torch.no_grad():
            expected = run_batch(model, example_inputs)
    except Exception as error:
        raise QuantizationError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error
    captured = capture(model, example_inputs, dynamic_batch=dynamic_batch)
    lowered = _lowered(captured)
    _check_equal(_tensors(run_batch(lowered, example_inputs)), _tensors(expected))
    return lowered


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _check_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.dtype != b.dtype or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            raise VerificationError(
                f"output {index} of the lowered model differs from the model's on example_inputs; please report this"
            )


def _lowered(captured: Capture) -> LoweredModel:
    graph, context = captured.program.graph, captured.context
    nodes = [node for node in graph.nodes if node.op == "call_function" and not _is_check(node)]
    division = divide(nodes, context)
    programs = sorted({stage.level for stage in division.stages.values()})
    emissions = {level: Emission(level, division, context, _exported(division, level)) for level in programs}

    root: dict[str, Tensor | nn.Module] = {}
    body = fx.Graph()
    env: dict[Node, Node] = {}
    for node in captured.inputs:
        if node is not None:
            env[node] = body.placeholder(node.name)

    def constant(node: Node) -> Node:
        if node not in env:
            name, tensor = context.constants[node]
            root[name] = tensor
            env[node] = body.get_attr(name)
        return env[node]

    def copy(node: Node) -> None:
        for operand in node.all_input_nodes:
            if operand in context.constants:
                constant(operand)
        env[node] = body.node_copy(node, lambda operand: env[operand])
        env[node].meta = {}

    floats = [node for node in nodes if node not in division.stages and node not in division.inside]
    for level in range(max([*programs, *(division.levels[node] for node in floats)], default=0) + 1):
        for node in floats:
            if division.levels[node] == level:
                copy(node)
        if level in emissions:
            emission, name = emissions[level], f"program_{level}"
            root[name] = emission.builder.build()
            call = body.call_module(name, tuple(env[node] for node in emission.inputs))
            for index, node in enumerate(emission.outputs):
                env[node] = body.call_function(_item, (call, index))
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = fx.map_arg(output.args[0], lambda node: constant(node) if node in context.constants else env[node])
    body.output(tuple(results))
    module = fx.GraphModule(root, body, class_name="LoweredGraph")
    module.graph.eliminate_dead_code()
    module.recompile()
    spec = captured.program.call_spec
    assert spec.in_spec is not None and spec.out_spec is not None
    inputs = [_input(captured, index, env) for index in range(len(captured.inputs))]
    return LoweredModel(module, inputs, spec.in_spec, spec.out_spec, _report(nodes, division, len(programs)))


def _item(values: list[Tensor], index: int) -> Tensor:
    return values[index]


def _is_check(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return not node.users and any(part in name for part in _CHECKS)


def _exported(division: Division, level: int) -> list[Node]:
    """Values of a program that a float part, another program or the caller reads."""

    def readers(node: Node) -> list[int | None]:
        stages = [division.inside.get(user) or division.stages.get(user) for user in node.users]
        return [
            None if stage is None else _level(division, user) for stage, user in zip(stages, node.users, strict=True)
        ]

    nodes = [node for node, stage in division.stages.items() if stage.level == level]
    return [node for node in nodes if any(reader != level for reader in readers(node))]


def _level(division: Division, node: Node) -> int:
    while node in division.inside:
        (node,) = node.users
    return division.stages[node].level


def _input(captured: Capture, index: int, env: dict[Node, Node]) -> object:
    node = captured.inputs[index]
    if node is None:
        return captured.program.graph_signature.user_inputs[index]
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    free = value.dim() > 0 and not isinstance(value.shape[0], int)
    sizes = tuple(int(size) for size in (value.shape[1:] if free else value.shape))
    read = any(user.op == "call_function" for user in env[node].users)
    last = layout(node, captured.context) if read else None
    return InputSpec(node.name, sizes, None if free else -1, value.dtype, last)


def _report(nodes: list[Node], division: Division, programs: int) -> LoweringReport:
    rows = []
    for node in nodes:
        if not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        operator = str(node.target).removesuffix(".default")
        integer = node in division.stages or node in division.inside
        reason = "" if integer else division.reasons.get(node, "")
        module = stack[-1][0] if stack else ""
        rows.append(LoweredNode(node.name, module, operator, "integer" if integer else "float", reason))
    return LoweringReport(tuple(rows), programs)
