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


def quantize_codebook(x: Tensor, scale: Tensor, entries: Tensor, *, group_size: int) -> Tensor:
    """Codes of the entries nearest to `x * (1 / scale)`: as many as there are midpoints below it; NaN gets the last code.

    Args:
        x: `[..., I]`, floating point.
        scale: `[..., I / group_size]`.
        entries: `[n]` float32, increasing.
        group_size: Elements of the last dimension that share a scale.

    Returns:
        uint8 codes of `x`'s shape.
    """
    inverse = broadcast_qparams(1.0 / scale.float(), x, axis=None, group_size=group_size)
    between = 0.5 * (entries[:-1] + entries[1:])
    return torch.bucketize(x.float() * inverse, between, out_int32=True).to(torch.uint8)


def dequantize_codebook(codes: Tensor, scale: Tensor, entries: Tensor, *, group_size: int) -> Tensor:
    """`scale * entries[code]` in float32; arguments as of `quantize_codebook`, `entries` may have more of them."""
    values = entries.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)
    return values * broadcast_qparams(scale.float(), codes, axis=None, group_size=group_size)


def quantize_rows_dynamic(x: Tensor, *, symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """INT8 codes and scales of each row of `x`, as the integer products find them at run time.

    Args:
        x: `[..., I]`, floating point.
        symmetric: Without zero points; else the 256 codes of a row cover its range, zero included.

    Returns:
        Codes less their zero point `[..., I]` int32, in [-127, 127] or spanning 255, and scales `[..., 1]` float32.
    """
    x = x.float()
    if not symmetric:
        scale, zero_point = asymmetric_row_qparams(x)
        return quantize(x, scale, zero_point, qmin=-128, qmax=127, group_size=x.shape[-1]) - zero_point, scale
    largest = torch.nan_to_num(x.abs(), nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True)
    scale = torch.clamp(largest / 127, min=torch.finfo(torch.float32).tiny)
    codes = quantize(x, scale, torch.zeros_like(scale), qmin=-127, qmax=127, group_size=x.shape[-1])
    return codes, scale


def asymmetric_row_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int32, of signed codes) of each row of `x` `[..., I]`, both `[..., 1]`; NaN does not count."""
    x = torch.nan_to_num(x.float(), nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = torch.clamp((high - low) / 255, min=torch.finfo(torch.float32).tiny)
    steps = torch.nan_to_num(low * (1 / scale)).clamp(min=-255)
    return scale, (-128 - torch.round(steps)).to(torch.int32)


def sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of the recurrent operators, bit for bit: float32, `1 / (1 + e^-x)`, within 2.5 ulp of the exact one."""
    return 1 / (1 + _exponential(-x))


def tanh(x: Tensor) -> Tensor:
    """The tanh of the recurrent operators, bit for bit: float32, within 2.5 ulp of the exact one."""
    square = x * x
    p = torch.full_like(x, -5.70498872745e-3)
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = p * square + coefficient
    large = 1 - 2 / (_exponential(2 * x.abs()) + 1)
    return torch.where(x.abs() < 0.625, p * square * x + x, torch.where(x < 0, 0 - large, large))


def recurrent_step(
    cell: str, x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Hidden and cell state after one step of a recurrent cell, as `ops.recurrent_cell` computes them.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x_gates: `[..., gates * H]` float32, input half of the gates.
        h_gates: The same of the hidden state.
        h: `[..., H]`, hidden state before; only a GRU reads it.
        c: `[..., H]`, cell state before, of an LSTM.
    """
    if cell == "lstm":
        assert c is not None
        i, f, g, o = (x_gates + h_gates).chunk(4, dim=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = x_gates.chunk(3, dim=-1), h_gates.chunk(3, dim=-1)
        n = tanh(xn + sigmoid(xr + hr) * hn)
        return n + sigmoid(xz + hz) * (h - n), None
    gates = x_gates + h_gates
    return (tanh(gates) if cell == "rnn_tanh" else torch.relu(gates)), None


def _exponential(x: Tensor) -> Tensor:
    """`e^x` of x clamped to [-87, 87], as gates.inl.h computes it."""
    x = x.clamp(-87, 87)
    n = torch.round(x * 1.44269504)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(x, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    power = ((torch.nan_to_num(n).to(torch.int32) + 127) << 23).view(torch.float32)  # 2^n by its exponent bits
    return (p * (r * r) + r + 1) * power
