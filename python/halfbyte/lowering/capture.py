"""The graph of a converted model: checks, `torch.export` with a dynamic batch, and its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from halfbyte.errors import QuantizationError
from halfbyte.lowering.functional import without_in_place
from halfbyte.lowering.operators import Context, size_of
from halfbyte.nn import QuantizedModule


@dataclass(frozen=True, slots=True)
class Capture:
    """A model as a graph.

    Attributes:
        program: What `torch.export` gave, without in-place operators.
        context: Batch size and weights.
        inputs: Placeholder of each tensor input, in the order of the flattened arguments; None for other arguments.
        dynamic: Whether the batch size is free.
    """

    program: ExportedProgram
    context: Context
    inputs: tuple[Node | None, ...]
    dynamic: bool


def arguments_of(example: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments of a batch.

    Raises:
        TypeError: It is none of the kinds that `hb.calibrate` takes.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise TypeError(
        f"example_inputs is a {type(example).__name__}; give a tensor, a tuple of positional or a dict of keyword arguments"
    )


def check_model(model: nn.Module) -> None:
    """Raises unless the model can be lowered: converted, in evaluation mode, with its weights there.

    Raises:
        TypeError: It is no module.
        QuantizationError: One of the others.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module that hb.quantize_ converted")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedModule)]
    if not any(m.act_scale is not None for _, m in layers):
        found = f"has {len(layers)} quantized layers, but none" if layers else "has no layer"
        raise QuantizationError(
            f"the model {found} with static INT8 activations, which is what lower keeps as integers: "
            "hb.quantize_(model, hb.int8_static(), data) first"
        )
    for name, module in model.named_modules():
        if module.training:
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise QuantizationError(f"{where} is in training mode; call model.eval() before hb.lower")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            fix = "hb.load_ gives it its weights" if tensor.is_meta else "model.cpu() moves it"
            raise QuantizationError(f"{name} is on the {tensor.device.type} device; hb.lower needs the CPU: {fix}")


def capture(model: nn.Module, example_inputs: object, *, dynamic_batch: bool) -> Capture:
    """The graph of a model that `check_model` passed.

    Raises:
        QuantizationError: The example does not fit, or `torch.export` cannot trace the model.
    """
    args, kwargs = arguments_of(example_inputs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not any(t.dim() > 0 for t in tensors):
        raise QuantizationError("example_inputs hold no tensor with a batch dimension")
    if any(t.device.type != "cpu" for t in tensors):
        raise QuantizationError("example_inputs are not on the CPU")
    batch = next(t for t in tensors if t.dim() > 0).shape[0]
    if batch == 0:
        raise QuantizationError("example_inputs hold an empty batch; give at least one sample")
    dynamic = [
        dynamic_batch and isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves
    ]
    if dynamic_batch and batch == 1:  # torch.export takes sizes of 1 for fixed
        leaves = [torch.cat([t, t]) if d else t for t, d in zip(leaves, dynamic, strict=True)]
    leaves = [_same_layout(new, old) for new, old in zip(leaves, pytree.tree_leaves((args, kwargs)), strict=True)]
    dim = Dim("batch", min=1)
    positional, keyword = pytree.tree_unflatten([{0: dim} if d else None for d in dynamic], spec)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        with torch.no_grad():
            program = torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=_shapes_by_name(model, positional, keyword) if dynamic_batch else None,
                strict=False,
            )
            program = without_in_place(program)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        hint = "; dynamic_batch=False fixes the batch size" if dynamic_batch and "onstraint" in str(error) else ""
        raise QuantizationError(
            f"torch.export cannot trace the model ({type(error).__name__}: {first}){hint}; the model itself runs as it is"
        ) from error
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise QuantizationError(f"the model's forward changes {changed[0]} in place; hb.lower needs one that does not")
    return _captured(model, program, dynamic_batch)


def _same_layout(new: object, old: object) -> object:
    if not isinstance(new, Tensor) or not isinstance(old, Tensor) or new is old or new.dim() < 3:
        return new
    if not old.is_contiguous() and old.movedim(1, -1).is_contiguous():
        return new.movedim(1, -1).contiguous().movedim(-1, 1)
    return new


def _shapes_by_name(
    model: nn.Module, positional: tuple[object, ...], keyword: dict[str, object]
) -> tuple[object, ...] | dict[str, object]:
    """`dynamic_shapes` as torch.export wants it: in order, or all by name."""
    if not keyword:
        return positional
    names = list(inspect.signature(model.forward).parameters)[: len(positional)]
    return {**dict(zip(names, positional, strict=True)), **keyword}


def _captured(model: nn.Module, program: ExportedProgram, dynamic: bool) -> Capture:
    signature = program.graph_signature
    known = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    constants: dict[Node, tuple[str, Tensor]] = {}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, node in placeholders.items():
        if name in names:
            target = names[name]
            tensor = known.get(target)
            constants[node] = (target, program.constants[target] if tensor is None else tensor)
        elif name in lifted:
            constants[node] = (lifted[name], program.constants[lifted[name]])
    inputs = tuple(placeholders.get(name) if isinstance(name, str) else None for name in signature.user_inputs)
    tensors = [n for n in inputs if n is not None and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dim() > 0]
    sizes = [size_of(n.meta["val"].shape[0]) for n in tensors]
    symbols = [size for size in sizes if not isinstance(size, int)]
    return Capture(program, Context((symbols or sizes)[0], constants), inputs, dynamic)
