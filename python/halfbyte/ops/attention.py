"""The two products of attention between INT8 codes that are found at run time."""

from __future__ import annotations

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import refuse_gradient

__all__ = ["attention_scores_int8", "attention_values_int8"]

_scores = torch.ops.halfbyte.attention_scores_int8.default
_values = torch.ops.halfbyte.attention_values_int8.default


def attention_scores_int8(query: Tensor, key: Tensor) -> Tensor:
    """`query @ keyᵀ` of INT8 codes: each query and each key has a scale of its own, `absmax / 127`.

    Equal, bit for bit, to `linear_int8` for each head with the codes of its keys as weights.

    Args:
        query: `[..., L, d]` float32.
        key: `[..., S, d]` float32.

    Returns:
        `[..., L, S]` float32, not divided by `sqrt(d)`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes that do not fit.

    Example:
        >>> hb.ops.attention_scores_int8(torch.randn(2, 4, 5, 16), torch.randn(2, 4, 7, 16)).shape
        torch.Size([2, 4, 5, 7])
    """
    _check("query", query, "key", key, key.dim() - 1)
    y: Tensor = _scores(query.flatten(0, -3), key.flatten(0, -3))
    return y.reshape(*query.shape[:-1], key.shape[-2])


def attention_values_int8(weights: Tensor, value: Tensor) -> Tensor:
    """`weights @ value` of INT8 codes: a scale for each value, which the weights take over, and then one for each query.

    The codes of weights have a zero point for each query, as with `linear_int8(..., asymmetric=True)`, to which this is equal
    bit for bit for each head with the codes of its values as weights. A query whose weights are all NaN, since it attends to
    nothing, gets 0.

    Args:
        weights: `[..., L, S]` float32.
        value: `[..., S, d]` float32.

    Returns:
        `[..., L, d]` float32.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes that do not fit.

    Example:
        >>> hb.ops.attention_values_int8(torch.rand(2, 4, 5, 7), torch.randn(2, 4, 7, 16)).shape
        torch.Size([2, 4, 5, 16])
    """
    _check("weights", weights, "value", value, value.dim() - 2)
    y: Tensor = _values(weights.flatten(0, -3), value.flatten(0, -3))
    return y.reshape(*weights.shape[:-1], value.shape[-1])


def _check(a_name: str, a: Tensor, b_name: str, b: Tensor, shared: int) -> None:
    for name, tensor in ((a_name, a), (b_name, b)):
        if tensor.dtype is not torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; use torch.float32")
    if a.dim() < 3 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[shared]:
        raise ValueError(f"{a_name} has shape {tuple(a.shape)} and {b_name} {tuple(b.shape)}: these do not fit")


def _scores_fake(query: Tensor, key: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], key.shape[1]))


def _values_fake(weights: Tensor, value: Tensor) -> Tensor:
    return weights.new_empty((*weights.shape[:-1], value.shape[2]))


_NO_GRADIENT = (
    "INT8 attention scores and values have no gradient; leave them in float where gradients must pass: give the scheme "
    "without hb.int8_attention"
)

for _name, _fake in (("scores", _scores_fake), ("values", _values_fake)):
    torch.library.register_fake(f"halfbyte::attention_{_name}_int8", _fake)
    refuse_gradient(f"attention_{_name}_int8", _NO_GRADIENT)
