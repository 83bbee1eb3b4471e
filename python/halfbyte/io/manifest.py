"""The JSON in a file's header: what is stored, and which modules it makes. `halfbyte.io` documents every key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import nn

from halfbyte.convolution import ConvGeometry
from halfbyte.errors import FileFormatError
from halfbyte.formats import FloatFormat, PerGroup
from halfbyte.nn import HalfConv, HalfEmbedding, HalfLinear, QuantizedConv, QuantizedEmbedding, QuantizedLinear
from halfbyte.nn.packed_weight import packed_shapes
from halfbyte.nn.quantized_module import ACTIVATION_BUFFERS
from halfbyte.ops import Layout
from halfbyte.schemes import Scheme

FORMAT_VERSION = 1
METADATA_KEY = "halfbyte"

ModuleClass: TypeAlias = type[nn.Module]
ModuleType = Literal[
    "QuantizedLinear", "QuantizedConv", "QuantizedEmbedding", "HalfLinear", "HalfConv", "HalfEmbedding"
]
_LINEAR_TYPES = ("QuantizedLinear", "HalfLinear")
_EMBEDDING_TYPES = ("QuantizedEmbedding", "HalfEmbedding")
_CONV_TYPES = ("QuantizedConv", "HalfConv")
_HALF_TYPES = ("HalfLinear", "HalfConv", "HalfEmbedding")

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleEntry:
    """What makes one quantized module, besides its tensors.

    Attributes:
        type: Class name in `halfbyte.nn`.
        scheme: Its scheme.
        shape: `(O, I)` of its weight.
        layout: Layout of its codes, None for 16-bit floats.
        dtype: Name of the dtype of its float side.
        bias: Whether it has one.
        geometry: Of a convolution, else None.
    """

    type: ModuleType
    scheme: Scheme
    shape: tuple[int, int]
    layout: Layout | None
    dtype: str
    bias: bool
    geometry: ConvGeometry | None = None

    @staticmethod
    def of(module: nn.Module) -> ModuleEntry:
        """Describes a module that halfbyte made."""
        kind: ModuleType
        layout: Layout | None
        geometry = None
        match module:
            case QuantizedLinear():
                kind, layout, shape = "QuantizedLinear", module.layout, (module.out_features, module.in_features)
                dtype, bias = module.dtype, module.bias is not None
            case QuantizedConv():
                kind, layout, geometry, dtype = "QuantizedConv", module.layout, module.geometry, module.dtype
                shape, bias = geometry.shape, module.bias is not None
            case HalfConv():
                kind, layout, geometry, dtype = "HalfConv", None, module.geometry, module.weight.dtype
                shape, bias = geometry.shape, module.bias is not None
            case QuantizedEmbedding():
                kind, layout, shape = "QuantizedEmbedding", module.layout, (module.num_embeddings, module.embedding_dim)
                dtype, bias = module.dtype, False
            case HalfLinear():
                kind, layout, shape = "HalfLinear", None, (module.out_features, module.in_features)
                dtype, bias = module.weight.dtype, module.bias is not None
            case HalfEmbedding():
                kind, layout, shape = "HalfEmbedding", None, (module.num_embeddings, module.embedding_dim)
                dtype, bias = module.dtype, False
            case _:
                raise TypeError(f"{type(module).__name__} is no quantized module that files know")
        return ModuleEntry(
            type=kind,
            scheme=module.scheme,
            shape=shape,
            layout=layout,
            dtype=dtype_name(dtype),
            bias=bias,
            geometry=geometry,
        )

    @property
    def replaces(self) -> ModuleClass:
        """The class whose place it takes."""
        if self.geometry is not None:
            return self.geometry.float_type
        return nn.Linear if self.type in _LINEAR_TYPES else nn.Embedding

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors that replace its float weight, by buffer name."""
        if isinstance(self.scheme.weight, FloatFormat):
            shape = self.shape if self.geometry is None else self.geometry.weight_shape
            return {"weight": (shape, self.scheme.weight.dtype)}
        assert self.layout is not None
        packed = packed_shapes(self.scheme.weight, self.layout, self.shape)
        activation = ACTIVATION_BUFFERS if self.type not in _EMBEDDING_TYPES and self.scheme.static else {}
        return {**packed, **{name: ((), dtype) for name, dtype in activation.items()}}

    def to_dict(self) -> dict[str, object]:
        """As in the file."""
        fields: dict[str, object] = {
            "type": self.type,
            "scheme": self.scheme.to_dict(),
            "shape": list(self.shape),
            "layout": self.layout,
            "dtype": self.dtype,
            "bias": self.bias,
        }
        return fields if self.geometry is None else {**fields, "geometry": self.geometry.to_dict()}

    @staticmethod
    def from_dict(name: str, fields: object) -> ModuleEntry:
        """Reads and checks an entry.

        Raises:
            FileFormatError: with the module's name.
        """
        match fields:
            case {
                "type": (
                    "QuantizedLinear"
                    | "QuantizedConv"
                    | "QuantizedEmbedding"
                    | "HalfLinear"
                    | "HalfConv"
                    | "HalfEmbedding"
                ) as kind,
                "scheme": dict(scheme_fields),
                "shape": [int(out_features), int(in_features)],
                "layout": ("tiles" | "rows" | None) as layout,
                "dtype": str(dtype),
                "bias": bool(bias),
                **rest,
            } if (
                rest.keys() == ({"geometry"} if kind in _CONV_TYPES else set())
                and out_features > 0
                and in_features > 0
                and dtype in FLOAT_DTYPES
            ):
                pass
            case _:
                raise FileFormatError(f"the entry of module {name!r} is not understood: {fields!r}")
        try:
            scheme = Scheme.from_dict(scheme_fields)
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"the scheme of module {name!r} is not understood: {error}") from error
        geometry = _geometry(name, rest["geometry"], (out_features, in_features)) if kind in _CONV_TYPES else None
        half = isinstance(scheme.weight, FloatFormat)
        if (
            half != (kind in _HALF_TYPES)
            or half != (layout is None)
            or (kind in ("QuantizedLinear", "QuantizedConv") and layout != "tiles")
        ):
            raise FileFormatError(f"module {name!r} cannot be a {kind} in {scheme.weight} with layout {layout}")
        if bias and kind in _EMBEDDING_TYPES:
            raise FileFormatError(f"module {name!r} cannot be a {kind} with a bias")
        if not isinstance(scheme.weight, FloatFormat):
            granularity = scheme.weight.granularity
            if isinstance(granularity, PerGroup) and in_features % granularity.group_size:
                raise FileFormatError(
                    f"module {name!r}: group_size={granularity.group_size} does not divide in_features={in_features}"
                )
        return ModuleEntry(
            type=kind,
            scheme=scheme,
            shape=(out_features, in_features),
            layout=layout,
            dtype=dtype,
            bias=bias,
            geometry=geometry,
        )


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor: name of its dtype, shape, and the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the JSON says.

    Attributes:
        modules: Quantized modules by qualified name.
        same_modules: Further names of those, to the name in `modules`.
        in_parts: Names of modules that stand for one with several weights, whose parts are modules of their own, to the class
            name of that one.
        folded: Names of batch normalizations that were folded, to the layer that took them in.
        tensors: Stored tensors by name.
        aliases: Further names of stored tensors.
        non_persistent: Names (stored or aliases) of buffers that `state_dict` leaves out.
    """

    halfbyte_version: str
    modules: Mapping[str, ModuleEntry]
    same_modules: Mapping[str, str] = field(default_factory=dict)
    in_parts: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    non_persistent: frozenset[str]

    def stored_name(self, name: str) -> str | None:
        """The name under which the tensor `name` is stored; None if the file has no such tensor."""
        name = self.aliases.get(name, name)
        return name if name in self.tensors else None

    def to_json(self) -> str:
        """The metadata value."""
        modules: dict[str, object] = {name: entry.to_dict() for name, entry in self.modules.items()}
        modules |= {name: {"same_as": first} for name, first in self.same_modules.items()}
        content: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "halfbyte_version": self.halfbyte_version,
            "modules": modules,
            "in_parts": dict(self.in_parts),
            "folded": dict(self.folded),
            "tensors": {
                name: {"dtype": t.dtype, "shape": list(t.shape), "sha256": t.sha256} for name, t in self.tensors.items()
            },
            "aliases": dict(self.aliases),
            "non_persistent": sorted(self.non_persistent),
        }
        return _canonical({**content, "sha256": _digest(content)})

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Reads and checks the metadata value.

        Raises:
            FileFormatError: written by a newer version, altered, or not understood.
        """
        try:
            content = json.loads(text)
            digest = content.pop("sha256", None) if isinstance(content, dict) else None
            expected_digest = _digest(content)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"its description is damaged: {error}") from error
        match content:
            case {"format_version": int(version), "halfbyte_version": str(written_by)} if not isinstance(version, bool):
                pass
            case _:
                raise FileFormatError("its description has no format_version: it is damaged")
        if version > FORMAT_VERSION:
            raise FileFormatError(
                f"it has format_version {version}, written by halfbyte {written_by}; this halfbyte reads up to "
                f"{FORMAT_VERSION}: upgrade halfbyte, or save the model again with this version"
            )
        if digest != expected_digest:
            raise FileFormatError("its description was altered: the digest does not match; get the file again")
        match content:
            case {
                "format_version": 1,
                "modules": dict(modules),
                "in_parts": dict(in_parts),
                "folded": dict(folded),
                "tensors": dict(tensors),
                "aliases": dict(aliases),
                "non_persistent": list(non_persistent),
                **rest,
            } if set(rest) == {"halfbyte_version"}:
                pass
            case _:
                raise FileFormatError(f"its description is not understood: it has the keys {sorted(content)}")
        same = {n: e["same_as"] for n, e in modules.items() if isinstance(e, dict) and set(e) == {"same_as"}}
        entries = {n: ModuleEntry.from_dict(n, e) for n, e in modules.items() if n not in same}
        stored = {name: _tensor_entry(name, entry) for name, entry in tensors.items()}
        for kind, pointers, targets in (("module", same, entries), ("tensor", aliases, stored)):
            for name, target in pointers.items():
                if not isinstance(target, str) or target not in targets or name in targets:
                    raise FileFormatError(f"{kind} {name!r} points to {target!r}, which the file does not have")
        if not all(isinstance(name, str) and (name in stored or name in aliases) for name in non_persistent):
            raise FileFormatError("its description names non-persistent buffers that the file does not have")
        return Manifest(
            halfbyte_version=written_by,
            modules=entries,
            same_modules=same,
            in_parts=in_parts,
            folded=folded,
            tensors=stored,
            aliases=aliases,
            non_persistent=frozenset(non_persistent),
        )


def _tensor_entry(name: str, fields: object) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "sha256": str(digest), **rest} if not rest and dtype in DTYPES:
            if all(isinstance(size, int) and size >= 0 for size in shape):
                return TensorEntry(dtype, tuple(shape), digest)
    raise FileFormatError(f"the entry of tensor {name!r} is not understood: {fields!r}")


def _geometry(name: str, fields: object, shape: tuple[int, int]) -> ConvGeometry:
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"not a convolution: {fields!r}")
        geometry = ConvGeometry.from_dict(fields)
        if geometry.shape != shape:
            raise ValueError(f"its weight would have shape {geometry.shape}, not {shape}")
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"the convolution {name!r} is not understood: {error}") from error
    return geometry


def _canonical(content: object) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _digest(content: object) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()
