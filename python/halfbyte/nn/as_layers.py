"""Float layers around tensors that exist: how modules that own bare weights are taken apart."""

from __future__ import annotations

from torch import Tensor, nn


def as_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` that holds `weight` itself, not a copy.

    Args:
        weight: `[O, I]`: a parameter, or a view of one such as a slice or a transpose.
        bias: `[O]` or None.

    Example:
        >>> weight = nn.Parameter(torch.randn(2, 8, 4))
        >>> hb.nn.as_linear(weight[1])(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = _as_parameter(weight)
    linear.register_parameter("bias", None if bias is None else _as_parameter(bias))
    return linear


def as_embedding(weight: Tensor, padding_idx: int | None = None) -> nn.Embedding:
    """An `nn.Embedding` that holds `weight` `[num_embeddings, embedding_dim]` itself, not a copy."""
    num_embeddings, embedding_dim = weight.shape
    embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx=padding_idx, device="meta")
    embedding.weight = _as_parameter(weight)
    return embedding


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
