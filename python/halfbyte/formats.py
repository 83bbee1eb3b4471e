"""Number formats: how the numbers of one tensor are represented.

A format is a value: frozen, comparable, hashable, and written to files by `to_dict`. Cross-field checks live in
`__post_init__`, so a format that exists is a format that works. Shapes use `O` out_features, `I` in_features and
`G = I / group_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch

_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale for each index of `axis`; for weights axis 0, the output channel."""

    axis: int = 0

    def __str__(self) -> str:
        return "per channel" if self.axis == 0 else f"per axis {self.axis}"


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for each `group_size` consecutive elements of the last dimension."""

    group_size: int

    def __post_init__(self) -> None:
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise TypeError(f"group_size={self.group_size!r} is not an integer; use a positive integer")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} is not positive; use e.g. 32, 64 or 128")

    def __str__(self) -> str:
        return f"group {self.group_size}"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale for each row of the last dimension, found at run time."""

    def __str__(self) -> str:
        return "per token"


Granularity: TypeAlias = PerTensor | PerAxis | PerGroup | PerToken


@dataclass(frozen=True, slots=True, kw_only=True)
class IntFormat:
    """Integers of 1 to 8 bits with a scale, and a zero point unless symmetric.

    `x̂ = (q - zero_point) * scale` with `qmin <= q <= qmax`. Symmetric formats are signed, asymmetric ones unsigned. One
    symmetric bit is binary: `x̂ = ±scale`.

    Args:
        bits: Width of a code, 1 to 8.
        symmetric: No zero point: zero is code 0 and the codes are signed.
        granularity: Which elements share a scale.
        narrow_range: Drop the most negative code, so that `qmin = -qmax`: ±127 at 8 bits, ternary at 2.
        scale_dtype: dtype in which scales are stored; the rounded scale is the one that is quantized with.

    Raises:
        ValueError: bits out of range, or a combination that has no meaning.

    Example:
        >>> IntFormat(bits=4, symmetric=False, granularity=PerGroup(32)).qmax
        15
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = PerAxis(0)
    narrow_range: bool = False
    scale_dtype: torch.dtype = torch.float32

    kind: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"bits={self.bits!r} is not an integer; use 1 to 8")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is not supported; use 1 to 8")
        if self.scale_dtype not in _SCALE_DTYPES.values():
            raise ValueError(f"scale_dtype={self.scale_dtype} is not supported; use {', '.join(_SCALE_DTYPES)}")
        if self.narrow_range and not self.symmetric:
            raise ValueError("narrow_range=True needs symmetric=True: an asymmetric range has its own zero point")
        if self.narrow_range and self.bits == 1:
            raise ValueError("narrow_range=True needs at least 2 bits: one symmetric bit is already ±scale")
        if self.bits == 1 and not self.symmetric:
            raise ValueError("bits=1 needs symmetric=True: binary weights are ±scale")

    @property
    def signed(self) -> bool:
        """Whether codes are signed; symmetric formats are."""
        return self.symmetric

    @property
    def binary(self) -> bool:
        """Whether the two codes mean -scale and +scale."""
        return self.bits == 1

    @property
    def qmin(self) -> int:
        """Smallest code; for binary, -1."""
        if not self.symmetric:
            return 0
        return -self.qmax if self.narrow_range or self.binary else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code; for binary, +1."""
        if self.binary:
            return 1
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def group_size(self, in_features: int) -> int:
        """Elements of the last dimension that share a scale: the group, or all `in_features`."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else in_features

    def with_granularity(self, granularity: Granularity) -> IntFormat:
        """The same numbers with scales shared otherwise."""
        return replace(self, granularity=granularity)

    def __str__(self) -> str:
        name = "binary" if self.binary else "ternary" if self.bits == 2 and self.narrow_range else f"int{self.bits}"
        parts = [name, str(self.granularity)]
        if not self.symmetric:
            parts.append("asymmetric")
        return " ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `format_from_dict` reads it back."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": _granularity_to_dict(self.granularity),
            "narrow_range": self.narrow_range,
            "scale_dtype": _dtype_name(self.scale_dtype),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A 16-bit floating-point type: the conservative choice, with no scales.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
    """

    dtype: torch.dtype

    kind: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        if self.dtype not in _FLOAT_DTYPES.values():
            raise ValueError(f"dtype={self.dtype} is not supported; use torch.bfloat16 or torch.float16")

    def __str__(self) -> str:
        return _dtype_name(self.dtype)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `format_from_dict` reads it back."""
        return {"kind": self.kind, "dtype": _dtype_name(self.dtype)}


Format: TypeAlias = IntFormat | FloatFormat


def format_from_dict(fields: Mapping[str, object]) -> Format:
    """The format that `to_dict` described.

    Raises:
        ValueError: unknown kind, unknown or missing keys, or values that make no format.
    """
    kind = fields.get("kind")
    if kind == IntFormat.kind:
        _expect_keys(fields, {"kind", "bits", "symmetric", "granularity", "narrow_range", "scale_dtype"})
        bits, symmetric, narrow = fields["bits"], fields["symmetric"], fields["narrow_range"]
        if not isinstance(bits, int) or not isinstance(symmetric, bool) or not isinstance(narrow, bool):
            raise ValueError(f"not an integer format: {dict(fields)}")
        return IntFormat(
            bits=bits,
            symmetric=symmetric,
            granularity=_granularity_from_dict(fields["granularity"]),
            narrow_range=narrow,
            scale_dtype=_dtype_from_name(fields["scale_dtype"], _SCALE_DTYPES),
        )
    if kind == FloatFormat.kind:
        _expect_keys(fields, {"kind", "dtype"})
        return FloatFormat(dtype=_dtype_from_name(fields["dtype"], _FLOAT_DTYPES))
    raise ValueError(f"unknown format kind {kind!r}; this version of halfbyte knows 'int' and 'float'")


def _granularity_to_dict(granularity: Granularity) -> dict[str, object]:
    match granularity:
        case PerTensor():
            return {"per": "tensor"}
        case PerAxis(axis):
            return {"per": "axis", "axis": axis}
        case PerGroup(group_size):
            return {"per": "group", "group_size": group_size}
        case PerToken():
            return {"per": "token"}


def _granularity_from_dict(fields: object) -> Granularity:
    match fields:
        case {"per": "tensor", **rest} if not rest:
            return PerTensor()
        case {"per": "axis", "axis": int(axis), **rest} if not rest:
            return PerAxis(axis)
        case {"per": "group", "group_size": int(group_size), **rest} if not rest:
            return PerGroup(group_size)
        case {"per": "token", **rest} if not rest:
            return PerToken()
    raise ValueError(f"unknown granularity {fields!r}")


def _expect_keys(fields: Mapping[str, object], expected: set[str]) -> None:
    if set(fields) != expected:
        raise ValueError(f"format has keys {sorted(fields)}, expected {sorted(expected)}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from_name(name: object, allowed: Mapping[str, torch.dtype]) -> torch.dtype:
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"unknown dtype {name!r}; use {', '.join(allowed)}")
    return allowed[name]
