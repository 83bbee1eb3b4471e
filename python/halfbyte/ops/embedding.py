"""Rows of a packed table, dequantized as they are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.checks import FLOAT_DTYPES, check_bits, check_codebook, check_codes, check_float, check_group_size
from halfbyte.ops.packing import packed_shape

__all__ = ["embedding_weight_only"]

_embedding_weight_only = torch.ops.halfbyte.embedding_weight_only.default


def embedding_weight_only(
    indices: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int | None = None,
    tiled: bool = False,
    dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> Tensor:
    """Gathers rows `(u - zero_point) * scale` of a table of `V` rows of length `D`.

    Args:
        indices: Any shape; int32 or int64, each in `[0, V)`.
        qweight: uint8 codes, in the rows layout or, if `tiled`, the tiles layout.
        scale: `[V, G]`, or `[G, V]` if `tiled`; float32, bfloat16 or float16.
        zero_point: uint8 of `scale`'s shape; None for symmetric tables and, with `bits=1`, for ±scale.
        bits: 1 to 8.
        num_embeddings: V.
        embedding_dim: D.
        group_size: Elements of a row that share a scale; None: all of it.
        tiled: Whether the table is that of an output layer, in the tiles layout.
        dtype: dtype of the output: float32, bfloat16 or float16.
        codebook: As in `linear_weight_only`: rows are `codebook[u] * scale`.

    Returns:
        `[*indices.shape, D]`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape does not fit the others.
        IndexError: An index is outside the table; nothing is read then.

    Example:
        >>> import torch, halfbyte as hb
        >>> table = hb.ops.pack(torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), 4)
        >>> hb.ops.embedding_weight_only(
        ...     torch.tensor([1, 0]), table, torch.full((2, 1), 0.5), bits=4, num_embeddings=2, embedding_dim=2
        ... )
        tensor([[ 1.5000,  2.0000],
                [ 0.5000, -1.0000]])
    """
    check_codes(indices, "indices", (torch.int32, torch.int64))
    check_bits(bits)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype={dtype} is not supported; use float32, bfloat16 or float16")
    group = max(embedding_dim, 1) if group_size is None else group_size
    check_group_size(group, embedding_dim, "the table")
    check_codes(qweight, "qweight", (torch.uint8,))
    expected = packed_shape(
        (num_embeddings, embedding_dim), bits, layout="tiles" if tiled else "rows", group_size=group
    )
    if qweight.shape != expected:
        raise ValueError(
            f"qweight has shape {tuple(qweight.shape)}; num_embeddings={num_embeddings}, "
            f"embedding_dim={embedding_dim}, bits={bits}, group_size={group_size}, tiled={tiled} need {expected}"
        )
    groups = embedding_dim // group
    qparams = (groups, num_embeddings) if tiled else (num_embeddings, groups)
    check_float(scale, "scale")
    if scale.shape != qparams:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; it needs {qparams}")
    if zero_point is not None:
        check_codes(zero_point, "zero_point", (torch.uint8,))
        if zero_point.shape != qparams:
            raise ValueError(f"zero_point has shape {tuple(zero_point.shape)}; it needs {qparams}, as scale")
    check_codebook(codebook, bits, zero_point)
    try:
        y: Tensor = _embedding_weight_only(
            indices, qweight, scale, zero_point, bits, num_embeddings, embedding_dim, group, tiled, dtype, codebook
        )
    except RuntimeError as error:
        # The stable ABI knows one exception type; an index outside the table is the user's IndexError.
        message = str(error)
        if "is outside a table of num_embeddings" not in message:
            raise
        raise IndexError(message[message.index("index ") :].splitlines()[0]) from None
    return y


def _embedding_weight_only_fake(
    indices: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    num_embeddings: int,
    embedding_dim: int,
    group_size: int,
    tiled: bool,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    return qweight.new_empty((*indices.shape, embedding_dim), dtype=dtype)


torch.library.register_fake("halfbyte::embedding_weight_only", _embedding_weight_only_fake)
