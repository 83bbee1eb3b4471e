"""`hb.load_`: a saved model put into a skeleton."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from halfbyte.convolution import ConvModule
from halfbyte.errors import FileFormatError, QuantizationError
from halfbyte.formats import CodebookFormat
from halfbyte.fusion import FUSED_TYPES, fold_structure
from halfbyte.io.container import Reader
from halfbyte.io.manifest import DTYPES, FLOAT_DTYPES, METADATA_KEY, Manifest, ModuleEntry
from halfbyte.io.tensors import Slot, sha256, tensor_slots
from halfbyte.nn import (
    FoldedBatchNorm,
    HalfConv,
    HalfEmbedding,
    HalfLinear,
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
)
from halfbyte.nn.conv import quantized_conv_type
from halfbyte.parametrized import why_resolved
from halfbyte.parts import is_in_parts, take_apart
from halfbyte.swap import in_parts, interrupts_deferred, replace_module
from halfbyte.targets import conv_geometry, disable_fast_paths, is_converted, is_target, weight_shape

M = TypeVar("M", bound=nn.Module)
_FLOATS = {DTYPES[name] for name in FLOAT_DTYPES}


def load_(skeleton: M, path: str | os.PathLike[str]) -> M:
    """Loads a saved model into a model of the same architecture, in place.

    Needs no float weights and no quantize call. Parameters and buffers get the values and dtypes of the file, tensors that
    were shared are shared again, and outputs equal those of the saved model bit for bit. Tensors are copies: the file may be
    overwritten or deleted afterwards. Everything is checked before the skeleton is changed.

    Args:
        skeleton: The float model, built from its configuration, on the CPU or on the meta device, of any float dtype; its
            weights do not matter.
        path: A file that `hb.save` wrote.

    Returns:
        The skeleton, quantized, in training or evaluation mode as it was.

    Raises:
        FileFormatError: truncated, altered, not written by halfbyte, written by a newer version, or made for another model;
            says which tensor or module, and what to do. The skeleton is as it was.
        QuantizationError: the skeleton is quantized already, or not on the CPU or meta device.
        OSError: the file cannot be read.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = hb.quantize_(model, hb.int4_weight_only(32), progress=False)
        >>> path = tmp_path / "model.safetensors"
        >>> hb.save(model, path)
        >>> with torch.device("meta"):
        ...     skeleton = nn.Sequential(nn.Linear(64, 32))
        >>> hb.load_(skeleton, path)[0].qweight.shape
        torch.Size([2, 512])
    """
    _check_skeleton(skeleton)
    path = Path(path).absolute()
    with ExitStack() as stack:
        try:
            with Reader(path) as reader:
                manifest = _read_manifest(reader)
                _check_in_parts(skeleton, manifest)
                stack.enter_context(in_parts(skeleton, manifest.in_parts.keys() | _to_resolve(skeleton, manifest)))
                stack.enter_context(_folded_alike(skeleton, manifest))
                _check_modules(skeleton, manifest)
                slots = _slots_to_fill(skeleton, manifest)
                _check_tensors(slots, manifest)
                tensors = {name: _read_checked(reader, manifest, name) for name in manifest.tensors}
                _check_codebooks(manifest, tensors)
        except FileFormatError as error:
            raise FileFormatError(f"cannot load {path}: {error}") from error
        _fill(skeleton, manifest, slots, tensors)
    return skeleton


def _fill(skeleton: nn.Module, manifest: Manifest, slots: dict[str, Slot], tensors: dict[str, Tensor]) -> None:
    """Puts tensors and quantized modules in, all or nothing."""
    contents = _Contents(manifest, tensors)
    modules = {name: contents.module(skeleton, name, entry) for name, entry in manifest.modules.items()}
    filled = {
        name: contents.parameter(name, slot.tensor) if slot.is_parameter else contents.tensor(name)
        for name, slot in slots.items()
    }
    with interrupts_deferred():
        for name, slot in slots.items():
            setattr(slot.module, slot.name, filled[name])  # not past __setattr__: nn.LSTM keeps a list of its weights
        for name, module in modules.items():
            names = [name, *(other for other, first in manifest.same_modules.items() if first == name)]
            replace_module(skeleton, names, module)
        disable_fast_paths(skeleton)


def _check_skeleton(skeleton: nn.Module) -> None:
    if not isinstance(skeleton, nn.Module):
        raise TypeError(f"skeleton is a {type(skeleton).__name__}; pass the float model, built from its configuration")
    for name, module in skeleton.named_modules():
        if is_converted(module):
            raise QuantizationError(f"{name or 'the skeleton'} is quantized already; pass the float model")
    for name, slot in tensor_slots(skeleton).items():
        if slot.tensor.device.type not in ("cpu", "meta"):
            raise QuantizationError(
                f"{name} is on {slot.tensor.device}; build the skeleton on the CPU or the meta device"
            )


def _read_manifest(reader: Reader) -> Manifest:
    text = reader.metadata.get(METADATA_KEY)
    if text is None:
        raise FileFormatError("it is a safetensors file that halfbyte did not write; quantize the model and hb.save it")
    manifest = Manifest.from_json(text)
    if manifest.tensors.keys() != reader.tensors.keys():
        names = _some(manifest.tensors.keys() ^ reader.tensors.keys())
        raise FileFormatError(f"it was altered: its description and its tensors differ in {names}; get it again")
    for name, entry in manifest.tensors.items():
        stored = reader.tensors[name]
        if (stored.dtype, stored.shape) != (DTYPES[entry.dtype], entry.shape):
            raise FileFormatError(f"it was altered: tensor {name!r} is not what its description says; get it again")
    return manifest


def _check_in_parts(skeleton: nn.Module, manifest: Manifest) -> None:
    """Checks that the modules that the file has in parts can be taken apart in the model."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name, kind in manifest.in_parts.items():
        module = modules.get(name)
        if module is None or not (is_in_parts(module) or isinstance(take_apart(module), nn.Module)):
            found = f"has no module {name!r}" if module is None else f"has a {type(module).__name__} as {name!r}"
            raise FileFormatError(
                f"the model {found} where the file has the parts of a {kind}; build the model as it was built when it was saved"
            )


@contextmanager
def _folded_alike(skeleton: nn.Module, manifest: Manifest) -> Iterator[None]:
    """Takes out the batch normalizations that the file has folded; puts them back if the block fails.

    Raises:
        FileFormatError: the skeleton has no such normalization after no such layer.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name, layer in manifest.folded.items():
            modules = dict(skeleton.named_modules(remove_duplicate=False))  # aliases of one that is folded are, too
            norm = modules.get(name)
            if isinstance(norm, FoldedBatchNorm):
                continue
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not isinstance(modules.get(layer), FUSED_TYPES):
                raise FileFormatError(
                    f"the file has {name!r} as a batch normalization that was folded into {layer!r}, the model has a "
                    f"{type(norm).__name__} there; build the model as it was built before it was fused"
                )
            undo.append(fold_structure(skeleton, layer, name))
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _to_resolve(skeleton: nn.Module, manifest: Manifest) -> set[str]:
    """Parametrized layers that have quantized weights in the file."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    return {name for name in manifest.modules if name in modules and why_resolved(modules[name]) is not None}


def _check_modules(skeleton: nn.Module, manifest: Manifest) -> None:
    """Checks that each quantized module of the file has a float one to replace, and its tensors."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    for name in (*manifest.modules, *manifest.same_modules):
        entry = manifest.modules[manifest.same_modules.get(name, name)]
        kind = entry.replaces
        module = modules.get(name)
        if module is None:
            near = difflib.get_close_matches(name, modules, n=2, cutoff=0.5)
            hint = f" (it has {', '.join(near)})" if near else ""
            raise FileFormatError(f"the model has no module {name!r}{hint}; build it as it was built when it was saved")
        if not isinstance(module, kind) or not is_target(module):
            raise FileFormatError(
                f"module {name!r} is a {type(module).__name__} in the model but takes the place of a {kind.__name__} in the "
                "file; build the model as it was built when it was saved"
            )
        weight = module._parameters.get("weight")
        if weight is None or is_lazy(weight):
            raise FileFormatError(f"module {name!r} has no weight parameter of known shape")
        if weight_shape(module) != entry.shape:
            raise FileFormatError(
                f"module {name!r} has weight shape {weight_shape(module)} in the model and {entry.shape} in the file; "
                "build the model with the sizes it was saved with"
            )
        if entry.geometry is not None and conv_geometry(module) != entry.geometry:
            raise FileFormatError(
                f"module {name!r} is a convolution with {conv_geometry(module).description()} in the model and "
                f"{entry.geometry.description()} in the file; build the model as it was built when it was saved"
            )
        has_bias = getattr(module, "bias", None) is not None
        if has_bias != entry.bias:
            raise FileFormatError(
                f"module {name!r} has {'a' if has_bias else 'no'} bias in the model and {'one' if entry.bias else 'none'} in "
                "the file; build the model as it was built when it was saved"
            )
    for name, entry in manifest.modules.items():
        expected = entry.tensors()
        for tensor_name, (shape, dtype) in expected.items():
            _check_stored(manifest, f"{name}.{tensor_name}", shape, {dtype})
        if entry.bias:
            _check_stored(manifest, f"{name}.bias", entry.shape[:1], _FLOATS)


def _check_stored(manifest: Manifest, name: str, shape: tuple[int, ...], dtypes: set[torch.dtype]) -> None:
    stored_name = manifest.stored_name(name)
    if stored_name is None:
        raise FileFormatError(f"it has no tensor {name!r}, which its description asks for")
    stored = manifest.tensors[stored_name]
    if stored.shape != shape or DTYPES[stored.dtype] not in dtypes:
        raise FileFormatError(f"tensor {name!r} is {stored.dtype} {stored.shape}, which does not fit its module")


def _slots_to_fill(skeleton: nn.Module, manifest: Manifest) -> dict[str, Slot]:
    """The skeleton's slots outside the modules that are replaced, less derived buffers that only the skeleton knows."""
    replaced = {id(skeleton.get_submodule(name)) for name in (*manifest.modules, *manifest.same_modules)}
    slots = {name: slot for name, slot in tensor_slots(skeleton).items() if id(slot.module) not in replaced}
    missing = [name for name in slots if manifest.stored_name(name) is None]
    # A non-persistent buffer is derived from the configuration: one that the skeleton has computed may stay.
    kept = {name for name in missing if not slots[name].persistent and not slots[name].tensor.is_meta}
    if len(missing) > len(kept):
        names = _some(name for name in missing if name not in kept)
        raise FileFormatError(f"it has no values for {names}; the model was built otherwise when it was saved")
    of_modules = {
        f"{name}.{tensor}"
        for name in (*manifest.modules, *manifest.same_modules)
        for tensor in (
            *manifest.modules[manifest.same_modules.get(name, name)].tensors(),
            *(["bias"] if manifest.modules[manifest.same_modules.get(name, name)].bias else []),
        )
    }
    known = slots.keys() | of_modules | manifest.non_persistent
    unexpected = [name for name in (*manifest.tensors, *manifest.aliases) if name not in known]
    if unexpected:
        raise FileFormatError(
            f"it has {_some(unexpected)}, for which the model has no place; build it as it was built when it was saved"
        )
    return {name: slot for name, slot in slots.items() if name not in kept}


def _check_tensors(slots: dict[str, Slot], manifest: Manifest) -> None:
    for name, slot in slots.items():
        stored_name = manifest.stored_name(name)
        assert stored_name is not None
        stored = manifest.tensors[stored_name]
        dtype = DTYPES[stored.dtype]
        shape = None if is_lazy(slot.tensor) else tuple(slot.tensor.shape)
        if shape != stored.shape:
            raise FileFormatError(
                f"{name!r} has shape {shape} in the model and {stored.shape} in the file; build the model with the sizes "
                "it was saved with"
            )
        if slot.tensor.dtype != dtype and not (slot.tensor.is_floating_point() and dtype in _FLOATS):
            raise FileFormatError(f"{name!r} is {slot.tensor.dtype} in the model and {dtype} in the file")


def _read_checked(reader: Reader, manifest: Manifest, name: str) -> Tensor:
    tensor = reader.read(name)
    if sha256(tensor) != manifest.tensors[name].sha256:
        raise FileFormatError(f"tensor {name!r} was altered: its digest does not match; get the file again")
    return tensor


def _check_codebooks(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Checks that the tables which kernels will read hold the values of their formats."""
    for name, entry in manifest.modules.items():
        if not isinstance(entry.scheme.weight, CodebookFormat):
            continue
        stored_name = manifest.stored_name(f"{name}.codebook")
        assert stored_name is not None  # its shape was checked
        if not torch.equal(tensors[stored_name], entry.scheme.weight.table()):
            raise FileFormatError(f"the codebook of module {name!r} is not that of its format; get the file again")


class _Contents:
    """Tensors of a file, and the parameters made of them: one for each stored tensor, so that what was tied is tied."""

    def __init__(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        self._manifest = manifest
        self._tensors = tensors
        self._parameters: dict[str, nn.Parameter] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor of a slot or one of its aliases."""
        return self._tensors[self._stored_name(name)]

    def parameter(self, name: str, like: Tensor) -> nn.Parameter:
        """The same as a parameter, trainable if the skeleton's is."""
        stored_name = self._stored_name(name)
        if stored_name not in self._parameters:
            self._parameters[stored_name] = nn.Parameter(self._tensors[stored_name], requires_grad=like.requires_grad)
        return self._parameters[stored_name]

    def _stored_name(self, name: str) -> str:
        stored_name = self._manifest.stored_name(name)
        assert stored_name is not None  # all that is asked for was checked to be there
        return stored_name

    def module(self, skeleton: nn.Module, name: str, entry: ModuleEntry) -> nn.Module:
        """The quantized module that takes the place of `name`."""
        old, dtype = skeleton.get_submodule(name), DTYPES[entry.dtype]
        assert isinstance(old, nn.Linear | nn.Embedding | ConvModule)
        bias = None
        if not isinstance(old, nn.Embedding) and entry.bias:
            assert old.bias is not None
            bias = self.parameter(f"{name}.bias", old.bias)
        if entry.layout is None:
            weight = self.parameter(f"{name}.weight", old.weight)
            if isinstance(old, nn.Linear):
                return HalfLinear(entry.scheme, weight, bias)
            if isinstance(old, ConvModule):
                return HalfConv(entry.scheme, weight, bias, conv_geometry(old))
            return HalfEmbedding(entry.scheme, weight, dtype, old.padding_idx)
        buffers = {buffer: self.tensor(f"{name}.{buffer}") for buffer in entry.tensors()}
        packed = PackedWeight(
            buffers["qweight"],
            buffers["scale"],
            buffers.get("zero_point"),
            entry.layout,
            entry.shape,
            buffers.get("codebook"),
        )
        activation = (buffers["act_scale"], buffers["act_zero_point"]) if entry.scheme.static else None
        if isinstance(old, nn.Linear):
            return QuantizedLinear(entry.scheme, packed, bias, dtype, activation)
        if isinstance(old, ConvModule):
            geometry = conv_geometry(old)
            return quantized_conv_type(geometry)(entry.scheme, packed, bias, geometry, dtype, activation)
        return QuantizedEmbedding(entry.scheme, packed, dtype, old.padding_idx)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(repr(n) for n in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
