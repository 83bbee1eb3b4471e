"""Plain-torch reference of the arithmetic: slow, short, and what every operator is tested against.

Granularity is given as in the operators: neither `axis` nor `group_size` means per tensor; `axis` shares a scale along all
other dimensions (`scale` has shape `[x.shape[axis]]`); `group_size` shares one among consecutive elements of the last
dimension (`scale` has shape `[*x.shape[:-1], x.shape[-1] // group_size]`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_qparams(qparam: Tensor, x: Tensor, *, axis: int | None, group_size: int | None) -> Tensor:
    """`qparam` expanded so that it multiplies `x` elementwise."""
    if group_size is not None:
        return qparam.repeat_interleave(group_size, dim=-1).reshape(x.shape)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        return qparam.reshape(shape)
    return qparam.reshape(())


def round_to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Codes of `x` as float32 integers: `clamp(round(x / scale) + zero_point, qmin, qmax)`; NaN stays NaN."""
    inverse = broadcast_qparams(1.0 / scale.float(), x, axis=axis, group_size=group_size)
    zero = broadcast_qparams(zero_point.float(), x, axis=axis, group_size=group_size)
    return torch.clamp(torch.round(x.float() * inverse) + zero, qmin, qmax)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Codes of `x` as int32; NaN becomes `zero_point`."""
    codes = round_to_grid(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis, group_size=group_size)
    zero = broadcast_qparams(zero_point.float(), x, axis=axis, group_size=group_size)
    return torch.where(codes.isnan(), zero, codes).to(torch.int32)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int | None = None, group_size: int | None = None
) -> Tensor:
    """`(q - zero_point) * scale` in float32."""
    zero = broadcast_qparams(zero_point.float(), q, axis=axis, group_size=group_size)
    return (q.float() - zero) * broadcast_qparams(scale.float(), q, axis=axis, group_size=group_size)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Quantize and dequantize, in the dtype of `x`; NaN stays NaN."""
    codes = round_to_grid(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis, group_size=group_size)
    return dequantize(codes, scale, zero_point, axis=axis, group_size=group_size).to(x.dtype)


def quantize_rows_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes and scales of each row of `x`, as the integer products find them at run time.

    Args:
        x: `[..., I]`, floating point.

    Returns:
        Codes `[..., I]` int32 in [-127, 127] and scales `[..., 1]` float32.
    """
    x = x.float()
    largest = torch.nan_to_num(x.abs(), nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True)
    scale = torch.clamp(largest / 127, min=torch.finfo(torch.float32).tiny)
    codes = quantize(x, scale, torch.zeros_like(scale), qmin=-127, qmax=127, group_size=x.shape[-1])
    return codes, scale
