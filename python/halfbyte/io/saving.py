"""`hb.save`: a quantized model in one file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte._extension import __version__
from halfbyte.errors import QuantizationError
from halfbyte.io.container import write_file
from halfbyte.io.manifest import DTYPES, METADATA_KEY, Manifest, ModuleEntry, TensorEntry, dtype_name
from halfbyte.io.tensors import Slot, sha256, tensor_slots
from halfbyte.nn import FoldedBatchNorm
from halfbyte.parts import is_in_parts, type_before
from halfbyte.preparation import preparation_of
from halfbyte.qat.state import is_qat
from halfbyte.targets import is_converted


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a quantized model: integers, scales and what stayed in floating point, in one safetensors file.

    Equal models give equal bytes: a model saved twice, or saved after `load_`. Tensors that modules share are stored once. A
    file that exists is replaced only when the new one is complete, so an interrupted save leaves the old one.

    Args:
        model: A model that `quantize_` or `convert_` quantized; it is not changed.
        path: Where to write, usually `*.safetensors`; its folder must exist.

    Raises:
        QuantizationError: the model is not quantized, prepared but not converted, has tensors without data (meta device) or
            of a kind that the format has no name for.
        OSError: the file cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> path = tmp_path / "model.safetensors"
        >>> hb.save(model, path)
        >>> loaded = hb.load_(nn.Sequential(nn.Linear(64, 32)), path)
        >>> x = torch.randn(2, 64)
        >>> torch.equal(loaded(x), model(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass an nn.Module")
    modules, same_modules = _quantized_modules(model)
    slots = tensor_slots(model)
    stored, aliases = _stored_tensors(slots)
    manifest = Manifest(
        halfbyte_version=__version__,
        modules=modules,
        same_modules=same_modules,
        in_parts={name: type_before(m) for name, m in model.named_modules() if is_in_parts(m)},
        folded={
            name: m.into for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, FoldedBatchNorm)
        },
        tensors={name: TensorEntry(dtype_name(t.dtype), tuple(t.shape), sha256(t)) for name, t in stored.items()},
        aliases=aliases,
        non_persistent=frozenset(name for name, slot in slots.items() if not slot.persistent),
    )
    write_file(Path(path).resolve(), stored, {METADATA_KEY: manifest.to_json()})


def _quantized_modules(model: nn.Module) -> tuple[dict[str, ModuleEntry], dict[str, str]]:
    modules: dict[str, ModuleEntry] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise QuantizationError(
                f"{name}: {type(module).__name__} has an extra state that is no tensor, which files do not hold"
            )
        if not is_converted(module):
            continue
        if id(module) in first:
            same[name] = first[id(module)]
        else:
            first[id(module)] = name
            modules[name] = ModuleEntry.of(module)
    if not modules:
        if preparation_of(model) is not None or is_qat(model):
            raise QuantizationError("the model is prepared but not quantized yet: finish with hb.convert_(model)")
        raise QuantizationError(
            "the model is not quantized: quantize it first (hb.quantize_), or save a float model with "
            "safetensors.torch.save_model(model, path)"
        )
    if "" in modules:
        raise QuantizationError(
            "the model itself is one quantized module; wrap it: hb.save(nn.Sequential(model), path)"
        )
    return modules, same


def _stored_tensors(slots: dict[str, Slot]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor once, under its smallest name, and the other names: an order that no registration order moves."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name in sorted(slots):
        tensor = slots[name].tensor.detach()
        if tensor.is_meta:
            raise QuantizationError(f"{name} is on the meta device and has no data; load the weights first")
        if tensor.layout is not torch.strided or dtype_name(tensor.dtype) not in DTYPES:
            raise QuantizationError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which files do not hold")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = place if tensor.numel() else (id(slots[name].tensor),)
        if key in names:
            aliases[name] = names[key]
        else:
            names[key] = name
            stored[name] = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return stored, aliases
