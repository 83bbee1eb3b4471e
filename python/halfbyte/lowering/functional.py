"""In-place operators of an exported graph as the functions they stand for.

`ExportedProgram.run_decompositions` does this for every graph, and traces the model once more for it, which takes longer than
everything else together. Most models only use `relu_` and its kin on a tensor that nothing else shares.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node


def without_in_place(program: ExportedProgram) -> ExportedProgram:
    """The program with a graph that changes no tensor in place."""
    return program if _replace_all(program) else program.run_decompositions({})


def _replace_all(program: ExportedProgram) -> bool:
    """Replaces every in-place operator in the graph; False, with the graph as it was, if one is not that simple."""
    graph = program.graph
    changing = [node for node in graph.nodes if _changed(node) is not None]
    replaced = []
    for node in changing:
        x, function = _changed(node), _function(node)
        if function is None or not isinstance(x, Node) or x.op == "placeholder" or _is_shared(x, node):
            return False
        replaced.append((node, function))
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node, function in replaced:
        x = _changed(node)
        assert isinstance(x, Node)
        node.target = function
        for user in list(x.users):
            if order[user] > order[node]:
                user.replace_input_with(x, node)
    return True


def _changed(node: Node) -> object:
    """The argument that an operator changes, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, node)
    return None


def _function(node: Node) -> torch._ops.OpOverload | None:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    function = getattr(packet, target._overloadname, None)
    return function if isinstance(function, torch._ops.OpOverload) else None


def _is_shared(x: Node, change: Node) -> bool:
    """Whether another name than `x` may stand for its memory."""
    return _may_alias(x, {change}) or any(_may_alias(user, set()) for user in x.users if user is not change)


def _may_alias(node: Node, passed: set[Node]) -> bool:
    """Whether an operator's result may be (part of) one of its arguments' memory; in-place results follow `x`."""
    if node in passed or node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if _changed(node) is not None:
        return False
    aliases = any(result.alias_info is not None for result in schema.returns)
    # Operators that are made of others may return a view without saying so: reshape, contiguous, dropout ...
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return aliases or (composite and schema.name not in _FRESH)


_FRESH = {
    "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::linear", "aten::batch_norm", "aten::max_pool1d",
    "aten::max_pool2d", "aten::max_pool3d", "aten::layer_norm", "aten::silu", "aten::relu6", "aten::adaptive_avg_pool2d",
    "aten::adaptive_avg_pool1d", "aten::upsample_nearest2d", "aten::upsample_bilinear2d", "aten::selu",
}  # fmt: skip
