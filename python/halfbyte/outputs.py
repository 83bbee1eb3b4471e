"""The tensors inside whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["logits", "regression"]

_STATES = ("last_hidden_state", "pooler_output", "hidden_states", "attentions", "past_key_values", "encoder_")


def output_tensors(output: object, name: str = "output") -> dict[str, Tensor]:
    """Tensors of a model's output by name: a tensor, or tuples, lists, mappings and dataclasses of them, nested at will.

    Anything else, such as the cache objects of language models, is passed over.

    Example:
        >>> sorted(output_tensors({"logits": torch.ones(1), "states": (torch.ones(2), None)}))
        ['logits', 'states.0']
    """
    return dict(_walk(output, "")) if not isinstance(output, Tensor) else {name: output}


def _walk(output: object, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        return [(path, output)]
    items: list[tuple[object, object]] = []
    if isinstance(output, Mapping):  # transformers' ModelOutput is one too
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = list(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        items = [(field.name, getattr(output, field.name)) for field in fields(output)]
    return [pair for key, value in items for pair in _walk(value, f"{path}.{key}" if path else str(key))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits; NaN equals NaN whatever its payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a_bytes, b_bytes = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    if torch.equal(a_bytes, b_bytes):
        return True
    if not a.is_floating_point():
        return False
    nan = a.isnan()
    return (
        torch.equal(nan, b.isnan()) and same_bits(a.masked_fill(nan, 0), b.masked_fill(nan, 0)) if nan.any() else False
    )


def is_logits(name: str, tensor: Tensor, names: list[str], kind: Kind | None) -> bool:
    """Whether one of a model's outputs `names` is to be read as logits: by the user's word `kind`, or by its name and shape."""
    if kind == "regression" or tensor.dim() == 0 or tensor.shape[-1] < 2:
        return False
    if "logits" in names:
        return name == "logits"
    return kind == "logits" or not name.startswith(_STATES)


def attention_mask_of(batch: object) -> Tensor | None:
    """`[batch, positions]` bool, True where a position counts; None if the batch has no such mask."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
