"""Multi-head attention with its projections in parts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.nn.as_layers import as_linear
from halfbyte.nn.linear import HalfLinear, QuantizedLinear


class QuantizedMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` whose four projections `q_proj`, `k_proj`, `v_proj` and `out_proj` are layers of their own.

    Scores, softmax and the sum over values are in floating point, by `scaled_dot_product_attention` unless attention weights
    are asked for; with `hb.int8_attention`, scores and sums are INT8 products around a softmax in float32. The fused path of
    `nn.TransformerEncoderLayer`, which reads float weights, does not apply.

    Args:
        attention: The module whose place it takes.

    Example:
        >>> model = nn.TransformerEncoderLayer(64, nhead=4, batch_first=True).eval()
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> model(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    # What nn.TransformerEncoderLayer asks before it takes its fused path; with no packed weight to read, it does not.
    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (as_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = as_linear(attention.out_proj.weight, attention.out_proj.bias)
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: arguments, shapes and results.

        Returns:
            Output in the shape of `query`, and attention weights `[B, L, S]` (`[B, heads, L, S]` unless averaged) if
            `need_weights`.

        Raises:
            ValueError: shapes or devices of inputs or masks that do not fit, or `is_causal` without `attn_mask`.
            TypeError: inputs that are no tensors or differ in dtype, or a mask that is neither boolean nor floating point.
        """
        self._check_inputs(query, key, value)
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        batch, length, source = query.shape[0], query.shape[1], key.shape[1]
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask; give the mask as well")
        int8 = self.int8_products
        # Alone, the hint stands for the mask, which scaled_dot_product_attention then need not read.
        causal = is_causal and key_padding_mask is None and not need_weights and self.bias_k is None
        causal = causal and not self.add_zero_attn and not int8
        mask = (
            None
            if causal
            else self._mask(attn_mask, key_padding_mask, batch, length, source, query.dtype, query.device)
        )
        k, v = self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.expand(batch, 1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.expand(batch, 1, -1)), dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_proj(query), k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - source))  # appended keys are never masked
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights or int8:
            if int8:
                scores = ops.attention_scores_int8(q.float(), k.float()) * math.sqrt(1.0 / self.head_dim)
            else:
                scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            output = ops.attention_values_int8(weights, v.float()).to(v.dtype) if int8 else weights @ v
            weights = (weights.mean(dim=1) if average_attn_weights else weights).to(v.dtype) if need_weights else None
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    @property
    def int8_products(self) -> bool:
        """Whether scores and the sum over values are INT8 products: what the scheme of `q_proj` says."""
        return isinstance(self.q_proj, QuantizedLinear | HalfLinear) and self.q_proj.scheme.attention

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """As in `nn.MultiheadAttention`, for code that calls it."""
        return nn.MultiheadAttention.merge_masks(self, attn_mask, key_padding_mask, query)  # type: ignore[arg-type]

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} is a {type(x).__name__}; give a tensor")
            if x.dtype != query.dtype:
                raise TypeError(f"{name} has dtype {x.dtype}, query {query.dtype}; give them the same")
        dim = query.dim()
        if dim not in (2, 3) or key.dim() != dim or value.dim() != dim:
            raise ValueError(
                f"query, key and value have {dim}, {key.dim()} and {value.dim()} dimensions; give three each, or two without "
                "a batch"
            )
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"{name} has {x.shape[-1]} features in its last dimension; {width} are needed")
        batch_dim = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; their lengths and batches differ"
            )
        if dim == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(
                f"query has a batch of {query.shape[batch_dim]} and key of {key.shape[batch_dim]}; give them the same"
            )

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        batch: int,
        length: int,
        source: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor | None:
        """Both masks as one that is added to scores `[B, heads, L, S]`; True means left out."""
        merged: Tensor | None = None
        if attn_mask is not None:
            allowed = ((length, source), (batch * self.num_heads, length, source))
            if tuple(attn_mask.shape) not in allowed:
                raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; use {allowed[0]} or {allowed[1]}")
            merged = _additive("attn_mask", attn_mask, dtype, device)
            if attn_mask.dim() == 3:
                merged = merged.reshape(batch, self.num_heads, length, source)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, source):
                raise ValueError(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; use {(batch, source)}")
            padding = _additive("key_padding_mask", key_padding_mask, dtype, device)[:, None, None, :]
            merged = padding if merged is None else merged + padding
        return merged

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(name: str, mask: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if mask.device != device:
        raise ValueError(f"{name} is on the device {mask.device}, query on {device}; give both the same")
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; use torch.bool or floating point")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
