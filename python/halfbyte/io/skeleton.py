"""The float skeleton of a quantized model: what `load_` needs, made from the model itself."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from halfbyte.io.tensors import tensor_slots
from halfbyte.nn import HalfConv, HalfLinear, QuantizedConv, QuantizedLinear
from halfbyte.swap import replace_module
from halfbyte.targets import is_converted

M = TypeVar("M", bound=nn.Module)


def skeleton_of(model: M) -> M:
    """A copy of a quantized model on the meta device, with float modules where it has quantized ones.

    Takes no memory for tensors: the copy is told beforehand that each of them has a meta tensor for a copy.

    Raises:
        TypeError, RuntimeError: the model cannot be copied (it holds a lock, or a tensor with a graph).
    """
    memo: dict[int, object] = {}
    for slot in tensor_slots(model).values():
        tensor = slot.tensor
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        parameter = slot.is_parameter
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    skeleton = copy.deepcopy(model, memo)
    names: dict[int, list[str]] = {}
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if is_converted(module):
            names.setdefault(id(module), []).append(name)
    for of_one in names.values():
        replace_module(skeleton, of_one, _float_module(modules[of_one[0]]))
    return skeleton


def _float_module(module: nn.Module) -> nn.Module:
    if isinstance(module, QuantizedLinear | HalfLinear):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        if isinstance(module.bias, Tensor):
            linear.bias.requires_grad_(module.bias.requires_grad)
        return linear
    if isinstance(module, QuantizedConv | HalfConv):
        conv = module.geometry.float_module(bias=module.bias is not None)
        if isinstance(module.bias, Tensor) and conv.bias is not None:
            conv.bias.requires_grad_(module.bias.requires_grad)
        return conv
    rows, width, padding_idx = module.num_embeddings, module.embedding_dim, module.padding_idx
    assert isinstance(rows, int) and isinstance(width, int) and (padding_idx is None or isinstance(padding_idx, int))
    return nn.Embedding(rows, width, padding_idx=padding_idx, device="meta")
