"""Number formats: how the numbers of one tensor are represented.

A format is a value: frozen, comparable, hashable, and written to files by `to_dict`. Cross-field checks live in
`__post_init__`, so a format that exists is a format that works. Shapes use `O` out_features, `I` in_features and
`G = I / group_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

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

    @property
    def bits(self) -> int:
        """Width of a value."""
        return 8 * self.dtype.itemsize

    def __str__(self) -> str:
        return _dtype_name(self.dtype)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `format_from_dict` reads it back."""
        return {"kind": self.kind, "dtype": _dtype_name(self.dtype)}


# NormalFloat: quantiles of a normal distribution with an exact zero (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# e2m1: a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0). Its two zeros are one entry here.
FP4_VALUES = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODEBOOK_NAMES = {NF4_VALUES: "nf4", FP4_VALUES: "fp4"}
CODEBOOK_ENTRIES = 16  # at most, and in every table that kernels read: kCodebookEntries of elementwise.h


@dataclass(frozen=True, slots=True)
class CodebookFormat:
    """Up to 16 values of one's own choice with a scale: `x̂ = scale * values[code]`.

    Rounding takes the nearest value of `x / scale`, the lower one half way between two. Codes take as many bits as it takes to
    count the values: 4 for 9 to 16 of them.

    Args:
        values: 2 to 16 finite numbers in increasing order; they are rounded to float32. `hb.formats.NF4_VALUES` and
            `FP4_VALUES` are two.
        granularity: Which elements share a scale.
        scale_dtype: dtype in which scales are stored; the rounded scale is the one that is quantized with.

    Raises:
        TypeError: values that are not numbers.
        ValueError: too few or too many values, not in order, not finite, or all very small or large.

    Example:
        >>> CodebookFormat((-1, -0.25, 0, 0.25, 1), PerGroup(32)).bits
        3
        >>> str(CodebookFormat(NF4_VALUES, PerGroup(64)))
        'nf4 group 64'
    """

    values: tuple[float, ...]
    granularity: Granularity = PerAxis(0)
    scale_dtype: torch.dtype = torch.float32

    kind: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        given: Sequence[object] = self.values
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"values={given!r} is not a sequence of numbers; use e.g. (-1.0, -0.3, 0.0, 0.3, 1.0)")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
            raise TypeError(f"values={given!r} are not all numbers; use e.g. (-1.0, -0.3, 0.0, 0.3, 1.0)")
        if not 2 <= len(given) <= CODEBOOK_ENTRIES:
            raise ValueError(f"values has {len(given)} entries; use 2 to {CODEBOOK_ENTRIES}")
        values = tuple(torch.tensor(given, dtype=torch.float64).to(torch.float32).tolist())
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"values={given!r} are not all finite in float32")
        if any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"values={given!r} are not in increasing order; use sorted(set(values))")
        largest = max(abs(values[0]), abs(values[-1]))
        if not 1e-4 <= largest <= 1e4:
            raise ValueError(
                f"the largest magnitude of values is {largest:g}; multiply them all so that it lies between 1e-4 and 1e4: "
                "the scale of each group makes up for it"
            )
        if self.scale_dtype not in _SCALE_DTYPES.values():
            raise ValueError(f"scale_dtype={self.scale_dtype} is not supported; use {', '.join(_SCALE_DTYPES)}")
        object.__setattr__(self, "values", values)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def symmetric(self) -> bool:
        """There are no zero points."""
        return True

    @property
    def signed(self) -> bool:
        """Codes count from 0."""
        return False

    @property
    def binary(self) -> bool:
        """Not the ±scale of one-bit integers."""
        return False

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return len(self.values) - 1

    @property
    def reach(self) -> float:
        """Largest magnitude of the values: a group's largest weight over it is its scale, unless another is searched for."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    def entries(self) -> Tensor:
        """The values as a tensor."""
        return torch.tensor(self.values, dtype=torch.float32)

    def table(self) -> Tensor:
        """`[16]` float32, what kernels look codes up in: the values, the last one repeated for codes that do not occur."""
        return torch.tensor(self.values + self.values[-1:] * (CODEBOOK_ENTRIES - len(self.values)), dtype=torch.float32)

    def group_size(self, in_features: int) -> int:
        """Elements of the last dimension that share a scale: the group, or all `in_features`."""
        return self.granularity.group_size if isinstance(self.granularity, PerGroup) else in_features

    def with_granularity(self, granularity: Granularity) -> CodebookFormat:
        """The same numbers with scales shared otherwise."""
        return replace(self, granularity=granularity)

    def __str__(self) -> str:
        name = _CODEBOOK_NAMES.get(self.values) or f"codebook of {len(self.values)}"
        return f"{name} {self.granularity}"

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `format_from_dict` reads it back."""
        return {
            "kind": self.kind,
            "values": list(self.values),
            "granularity": _granularity_to_dict(self.granularity),
            "scale_dtype": _dtype_name(self.scale_dtype),
        }


PackedFormat: TypeAlias = IntFormat | CodebookFormat  # formats with codes of 1 to 8 bits
Format: TypeAlias = IntFormat | CodebookFormat | FloatFormat


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
    if kind == CodebookFormat.kind:
        _expect_keys(fields, {"kind", "values", "granularity", "scale_dtype"})
        values = fields["values"]
        if not isinstance(values, list):
            raise ValueError(f"not a codebook format: {dict(fields)}")
        return CodebookFormat(
            values=tuple(values),
            granularity=_granularity_from_dict(fields["granularity"]),
            scale_dtype=_dtype_from_name(fields["scale_dtype"], _SCALE_DTYPES),
        )
    if kind == FloatFormat.kind:
        _expect_keys(fields, {"kind", "dtype"})
        return FloatFormat(dtype=_dtype_from_name(fields["dtype"], _FLOAT_DTYPES))
    raise ValueError(f"unknown format kind {kind!r}; this version of halfbyte knows 'int', 'codebook' and 'float'")


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
