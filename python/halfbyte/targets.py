"""Which modules can be quantized, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from halfbyte.convolution import CONV_TYPES, ConvGeometry, ConvModule
from halfbyte.nn import HalfConv, HalfEmbedding, HalfLinear, QuantizedModule
from halfbyte.parts import is_in_parts, take_apart

TARGET_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONV_TYPES)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm, nn.LocalResponseNorm)


def is_target(module: nn.Module) -> bool:
    """Whether the module computes what a Linear, Embedding or convolution does, subclasses with the same forward included."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in TARGET_TYPES)


def is_converted(module: nn.Module) -> bool:
    """Whether the module is one that halfbyte made."""
    return isinstance(module, QuantizedModule | HalfLinear | HalfConv | HalfEmbedding)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """`(O, I)` of a target's weight matrix."""
    if isinstance(module, CONV_TYPES):
        return conv_geometry(module).shape
    weight = module.weight
    assert isinstance(weight, Tensor)
    out_features, in_features = weight.shape
    return out_features, in_features


def weight_matrix(module: nn.Module) -> Tensor:
    """`[O, I]` of a target, detached: its weight, or that of a convolution with inputs in the order (tap, channel)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return conv_geometry(module).weight_matrix(weight) if isinstance(module, CONV_TYPES) else weight


def set_weight_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Replaces the weight of a target by what `weight_matrix` of it gives, in its dtype."""
    weight = conv_geometry(module).weight_of(matrix) if isinstance(module, CONV_TYPES) else matrix
    old = module.weight
    assert isinstance(old, Tensor)
    module.weight = nn.Parameter(weight.to(old.dtype), requires_grad=False)


def conv_geometry(module: nn.Module) -> ConvGeometry:
    """Geometry of a convolution of torch's."""
    assert isinstance(module, ConvModule)
    return ConvGeometry.of(module)


def why_float(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a module with parameters stays in floating point whatever the recipe says; None if it need not."""
    if not is_target(module):
        if not any(parameter is not None for parameter in module._parameters.values()):
            return "has buffers only"
        taken = take_apart(module)
        if isinstance(taken, str):
            return taken
        if isinstance(module, _NORMS) or type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            return "normalization stays in floating point"
        if any(isinstance(module, kind) for kind in TARGET_TYPES):
            return f"{type(module).__name__} has a forward of its own"
        return f"no quantized form of {type(module).__name__}"
    for parent in _parents(name):
        if isinstance(modules[parent], nn.MultiheadAttention):
            return "nn.MultiheadAttention reads its weight past its forward"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter: something else computes it"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its rows in forward"
    if weight.dtype == torch.float64:
        return "float64 has no kernel"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def disable_fast_paths(model: nn.Module) -> Callable[[], None]:
    """Keeps `nn.TransformerEncoder(Layer)` off the fused path that reads the float weights of layers that are replaced.

    Returns:
        What undoes it.
    """
    before: list[tuple[nn.Module, str, object]] = []
    for module in model.modules():
        # What each asks for before it takes the fused path; see its forward.
        flag = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
        for kind, name in flag.items():
            if isinstance(module, kind) and any(is_converted(m) or is_in_parts(m) for m in module.modules()):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, False)

    def undo() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return undo


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name
