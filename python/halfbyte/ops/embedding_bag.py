"""Sums, means and maxima of rows of a low-bit table."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import refuse_gradient, skipped_autograd
from halfbyte.ops.checks import FLOAT_DTYPES, check_bits, check_codebook, check_codes, check_group_size

__all__ = ["BagMode", "embedding_bag_weight_only"]

_embedding_bag_weight_only = torch.ops.halfbyte.embedding_bag_weight_only.default

BagMode = Literal["sum", "mean", "max"]
_MODES: dict[BagMode, int] = {"sum": 0, "mean": 1, "max": 2}


def embedding_bag_weight_only(
    indices: Tensor,
    offsets: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int | None = None,
    tiled: bool = False,
    mode: BagMode = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> Tensor:
    """Reduces bags of rows `(u - zero_point) * scale` of a table of `V` rows of length `D`, without storing the rows.

    Sums run in the order of the indices, `sum = fma(weight * scale, u - zero_point, sum)` in float32. Empty bags are 0. With a
    codebook `sum = sum + (weight * scale) * codebook[u]`.

    Args:
        indices: `[N]` int32 or int64, all bags one after another, each in `[0, V)`.
        offsets: `[B]` where each bag begins; the first is 0 and none is less than the one before.
        qweight: uint8 codes, in the rows layout or, if `tiled`, the tiles layout.
        scale: `[V, G]`, or `[G, V]` if `tiled`; float32, bfloat16 or float16.
        zero_point: uint8 of `scale`'s shape; None for symmetric tables and, with `bits=1`, for ±scale.
        bits: 1 to 8.
        num_embeddings: V.
        embedding_dim: D.
        group_size: Elements of a row that share a scale; None: all of it.
        tiled: Whether the table is in the tiles layout.
        mode: How rows are reduced.
        per_sample_weights: `[N]` float32, what each row is multiplied with; mode sum only.
        include_last_offset: Whether `offsets` has one more entry, where the last bag ends: N.
        padding_idx: Row that is left out of bags.
        dtype: dtype of the output.
        codebook: As in `linear_weight_only`.

    Returns:
        `[B, D]`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others, or offsets are not in order.
        IndexError: An index is outside the table; nothing is read then.

    Example:
        >>> table = hb.ops.pack(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), 4)
        >>> hb.ops.embedding_bag_weight_only(
        ...     torch.tensor([1, 0, 1]), torch.tensor([0, 2]), table, torch.full((2, 1), 0.5),
        ...     bits=4, num_embeddings=2, embedding_dim=2, mode="sum",
        ... )
        tensor([[2.0000, 1.0000],
                [1.5000, 2.0000]])
    """
    group = embedding_dim if group_size is None else group_size
    try:
        with skipped_autograd(per_sample_weights):
            y: Tensor = _embedding_bag_weight_only(
                indices,
                offsets,
                per_sample_weights,
                qweight,
                scale,
                zero_point,
                bits,
                num_embeddings,
                embedding_dim,
                group,
                tiled,
                _MODES[mode],
                include_last_offset,
                padding_idx,
                dtype,
                codebook,
            )
    except Exception as error:
        _check(
            indices, offsets, per_sample_weights, qweight, zero_point, bits, embedding_dim, group, mode, dtype, codebook
        )
        # The stable ABI knows one exception type; values that only C++ reads are the user's mistakes all the same.
        message = str(error)
        for start, kind in (("index ", IndexError), ("offsets", ValueError)):
            place = message.find(start)
            if place >= 0 and ("outside a table" in message or start == "offsets"):
                raise kind(message[place:].splitlines()[0]) from None
        raise
    return y


def _check(
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    qweight: Tensor,
    zero_point: Tensor | None,
    bits: int,
    embedding_dim: int,
    group_size: int,
    mode: str,
    dtype: torch.dtype,
    codebook: Tensor | None,
) -> None:
    """Raises unless the arguments fit together; only where the operator refused them, or is traced."""
    check_codes(indices, "indices", (torch.int32, torch.int64))
    check_codes(offsets, "offsets", (torch.int32, torch.int64))
    check_codes(qweight, "qweight", (torch.uint8,))
    check_bits(bits)
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} is unknown; use 'sum', 'mean' or 'max'")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype={dtype} is not supported; use float32, bfloat16 or float16")
    check_group_size(group_size, embedding_dim, "the table")
    check_codebook(codebook, bits, zero_point)
    if indices.dim() != 1 or offsets.dim() != 1:
        raise ValueError(
            f"indices have shape {tuple(indices.shape)} and offsets {tuple(offsets.shape)}; use [N] and [B]"
        )
    if per_sample_weights is not None:
        if mode != "sum":
            raise ValueError(f"per_sample_weights need mode='sum', not {mode!r}")
        if per_sample_weights.shape != indices.shape:
            raise ValueError(
                f"per_sample_weights have shape {tuple(per_sample_weights.shape)}, indices {tuple(indices.shape)}; "
                "give one weight for each index"
            )


def _embedding_bag_weight_only_fake(
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    tiled: bool,
    mode: int,
    include_last_offset: bool,
    padding_idx: int | None,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    name = next(name for name, index in _MODES.items() if index == mode)
    _check(
        indices,
        offsets,
        per_sample_weights,
        qweight,
        zero_point,
        bits,
        embedding_dim,
        group_size,
        name,
        dtype,
        codebook,
    )
    bags = offsets.shape[0] - (1 if include_last_offset else 0)
    return qweight.new_empty((bags, embedding_dim), dtype=dtype)


_NO_GRADIENT = (
    "quantized tables have no gradient, and neither have per_sample_weights with them; leave the bag in float where "
    "gradients must pass, with hb.Recipe(..., overrides={nn.EmbeddingBag: None})"
)

torch.library.register_fake("halfbyte::embedding_bag_weight_only", _embedding_bag_weight_only_fake)
refuse_gradient("embedding_bag_weight_only", _NO_GRADIENT)
