"""Bags of embedding rows, reduced straight from a packed table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.nn.as_layers import as_embedding
from halfbyte.nn.embedding import HalfEmbedding, QuantizedEmbedding
from halfbyte.nn.trained_parts import run_parts, training_weight
from halfbyte.ops import BagMode
from halfbyte.ops.checks import check_codes


class QuantizedEmbeddingBag(nn.Module):
    """`nn.EmbeddingBag` whose rows are in the part `table`, a (quantized) embedding.

    Args:
        bag: The module whose place it takes.

    Example:
        >>> model = nn.ModuleDict({"bag": nn.EmbeddingBag(100, 64, mode="sum")})
        >>> recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={nn.EmbeddingBag: hb.int4_weight_only(32)})
        >>> _ = hb.quantize_(model, recipe, progress=False)
        >>> model["bag"](torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 2])).shape
        torch.Size([2, 64])
    """

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = bag.num_embeddings, bag.embedding_dim
        self.mode: BagMode = bag.mode  # type: ignore[assignment]
        self.padding_idx, self.include_last_offset = bag.padding_idx, bag.include_last_offset
        self.table = as_embedding(bag.weight, bag.padding_idx)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As `nn.EmbeddingBag.forward`: `[B, embedding_dim]`.

        Raises:
            ValueError: shapes that do not fit, offsets that are missing or not in order.
            TypeError: indices that are not int32 or int64.
            IndexError: an index outside the table; it is named.
        """
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("offsets are for input of one dimension; each row of a matrix is a bag")
            bags, length = input.shape
            offsets = torch.arange(bags, device=input.device) * length
            input = input.reshape(-1)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
            include_last_offset = False
        elif input.dim() == 1:
            if offsets is None:
                raise ValueError("input has one dimension and no offsets; give where each bag begins")
            include_last_offset = self.include_last_offset
        else:
            raise ValueError(f"input has {input.dim()} dimensions; use [B, L] or, with offsets, [N]")

        def run(table: nn.Module) -> tuple[Tensor]:
            return (self._reduce(table, input, offsets, per_sample_weights, include_last_offset),)

        return run_parts(run, self.table)[0]

    def _reduce(
        self,
        table: nn.Module,
        input: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        include_last_offset: bool,
    ) -> Tensor:
        if isinstance(table, QuantizedEmbedding):
            weights = None if per_sample_weights is None else per_sample_weights.float()
            return ops.embedding_bag_weight_only(
                input,
                offsets,
                table.qweight,
                table.scale,
                table.zero_point,
                bits=table.bits,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                group_size=table.group_size,
                tiled=table.layout == "tiles",
                mode=self.mode,
                per_sample_weights=weights,
                include_last_offset=include_last_offset,
                padding_idx=self.padding_idx,
                dtype=table.dtype,
                codebook=table.codebook,
            )
        assert isinstance(table, nn.Embedding | HalfEmbedding)
        _check_bags(input, offsets, self.num_embeddings)
        weight = training_weight(table)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(weight.dtype)
        y = F.embedding_bag(
            input,
            weight,
            offsets.to(input.dtype),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=self.padding_idx,
        )
        return y.to(table.dtype) if isinstance(table, HalfEmbedding) else y

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}"


def _check_bags(indices: Tensor, offsets: Tensor, num_embeddings: int) -> None:
    """What the operator for packed tables checks by itself; torch's own lets offsets pass that fall."""
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        check_codes(tensor, name, (torch.int32, torch.int64))
    if torch.compiler.is_compiling() or indices.is_meta or offsets.is_meta:
        return
    outside = indices[(indices < 0) | (indices >= num_embeddings)]
    if outside.numel():
        raise IndexError(f"index {outside[0].item()} is outside a table of num_embeddings={num_embeddings}")
    if offsets.numel() and offsets[0] != 0:
        raise ValueError("offsets[0] is not 0")
    limits = F.pad(offsets, (0, 1), value=indices.shape[0])
    falls = (limits.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0, 0])
        raise ValueError(
            f"offsets[{at}]={limits[at].item()} is followed by {limits[at + 1].item()}; offsets do not fall and end with the "
            "indices"
        )
