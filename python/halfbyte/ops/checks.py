"""Argument checks that the operators share. Cheap: they run at every call, before the C++ checks."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CODE = 1 << 20  # kMaxCode of elementwise.h


def check_float(x: Tensor, name: str) -> None:
    """Raises TypeError unless `x` is a float32, bfloat16 or float16 tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; pass a torch.Tensor")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}; use float32, bfloat16 or float16 (x.float() converts)")


def check_gradient(grad: Tensor, x: Tensor) -> None:
    """Raises unless `grad` can be the gradient of a result like `x`."""
    check_float(grad, "grad")
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} and dtype {grad.dtype}; x has {tuple(x.shape)} and {x.dtype}: they must agree"
        )


def check_codes(q: Tensor, name: str, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises TypeError unless `q` is a tensor of one of the integer dtypes."""
    if not isinstance(q, Tensor):
        raise TypeError(f"{name} is a {type(q).__name__}; pass a torch.Tensor")
    if q.dtype not in allowed:
        raise TypeError(f"{name} has dtype {q.dtype}; use {' or '.join(str(dtype) for dtype in allowed)}")


def check_bits(bits: int) -> None:
    """Raises unless `bits` is an integer from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits={bits!r} is not an integer; use 1 to 8")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 1..8")


def check_codebook(codebook: Tensor | None, bits: int, zero_point: Tensor | None) -> None:
    """Raises unless `codebook` is None or a table for codes of at most 4 bits without zero points."""
    if codebook is None:
        return
    if codebook.dtype is not torch.float32:
        raise TypeError(f"codebook has dtype {codebook.dtype}; use torch.float32")
    if codebook.shape != (16,):
        raise ValueError(
            f"codebook has shape {tuple(codebook.shape)}; it needs (16,): hb.CodebookFormat(values).table() makes one"
        )
    if bits > 4 or zero_point is not None:
        given = "none" if zero_point is None else "one"
        raise ValueError(f"a codebook needs bits of at most 4 and no zero_point; bits={bits}, and there is {given}")


def check_codebook_entries(codebook: Tensor | None) -> None:
    """Raises unless `codebook` is None or values that can be rounded to."""
    if codebook is None:
        return
    if codebook.dtype is not torch.float32:
        raise TypeError(f"codebook has dtype {codebook.dtype}; use torch.float32")
    if codebook.dim() != 1 or not 2 <= codebook.numel() <= 16:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}; use 2 to 16 values")
    if torch.compiler.is_compiling():
        return  # a graph cannot look at data
    if not bool(codebook.isfinite().all()) or not bool((codebook[1:] > codebook[:-1]).all()):
        raise ValueError(f"codebook={codebook.tolist()} is not finite and increasing; torch.unique(values) sorts them")


def check_range(qmin: int, qmax: int) -> None:
    """Raises ValueError unless `qmin <= qmax` and both fit the kernels."""
    if not -MAX_CODE <= qmin <= qmax <= MAX_CODE:
        raise ValueError(
            f"qmin={qmin}, qmax={qmax} is not a range of codes; use qmin <= qmax, both within ±{MAX_CODE} "
            "(int8 is -128..127, uint8 is 0..255)"
        )


def divisors_near(group_size: int, length: int) -> str:
    """The divisors of `length` next to `group_size`, for error messages."""
    divisors = [d for d in range(1, length + 1) if length % d == 0] if length <= 1 << 20 else [length]
    below = [d for d in divisors if d < group_size][-1:]
    above = [d for d in divisors if d > group_size][:1]
    return " or ".join(str(d) for d in below + above) or "1"


def check_group_size(group_size: int, length: int, name: str) -> None:
    """Raises ValueError unless `group_size` divides the last dimension of the tensor `name`."""
    if isinstance(group_size, bool) or not isinstance(group_size, (int, torch.SymInt)):
        raise TypeError(f"group_size={group_size!r} is not an integer")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is not positive; use None for no groups")
    if length % group_size != 0:
        raise ValueError(
            f"group_size={group_size} does not divide the last dimension of {name}, which is {length}; "
            f"use {divisors_near(int(group_size), int(length))}"
        )


def qparams_shape(x: Tensor, axis: int | None, group_size: int | None, name: str) -> tuple[int, ...] | None:
    """The shape that scale and zero point of `x` must have; None where they need one element, of any shape."""
    if group_size is not None:
        if axis is not None:
            raise ValueError(f"axis={axis} and group_size={group_size} exclude each other; pass one of them")
        if x.dim() == 0:
            raise ValueError(f"group_size={group_size} needs at least one dimension; {name} has none")
        check_group_size(group_size, x.shape[-1], name)
        return (*x.shape[:-1], x.shape[-1] // group_size)
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis={axis} is outside the {x.dim()} dimensions of {name}, which has shape {tuple(x.shape)}")
    return (x.shape[axis],)


def check_qparams(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None, name: str
) -> tuple[Tensor, Tensor]:
    """Checks scale and zero point against the granularity; returns them as float32 and int32."""
    if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
        raise TypeError("scale and zero_point are tensors; torch.tensor(value) makes one of a number")
    shape = qparams_shape(x, axis, group_size, name)
    for qparam, qparam_name in ((scale, "scale"), (zero_point, "zero_point")):
        if qparam.shape != shape if shape is not None else qparam.numel() != 1:
            expected = f"the shape {tuple(shape)}" if shape is not None else "one element"
            raise ValueError(
                f"{qparam_name} has shape {tuple(qparam.shape)}; {name} of shape {tuple(x.shape)} with "
                f"axis={axis}, group_size={group_size} needs {expected}"
            )
    if scale.dtype is not torch.float32:
        check_float(scale, "scale")
        scale = scale.float()
    if zero_point.dtype is not torch.int32:
        if zero_point.is_floating_point() or zero_point.is_complex() or zero_point.dtype is torch.bool:
            raise TypeError(f"zero_point has dtype {zero_point.dtype}; use torch.int32")
        zero_point = zero_point.to(torch.int32)
    return scale, zero_point
