"""Steps of recurrent layers whose parts the operator for whole sequences does not take: one by one, or by torch's own layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.nn.linear import HalfLinear, QuantizedLinear
from halfbyte.nn.trained_parts import for_steps
from halfbyte.ops import Cell


def cell_step(
    cell: Cell, x_gates: Tensor, h_gates: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """New hidden and cell state from both halves of the gates, in plain torch.

    Args:
        cell: Which equations; gates in PyTorch's order.
        x_gates: `[B, gates * H]`, input half.
        h_gates: `[B, gates * H]`, hidden half.
        h: `[B, H]`, hidden state before; only a GRU reads it.
        c: `[B, H]`, cell state before, of an LSTM.
    """
    if cell == "lstm":
        assert c is not None
        i, f, g, o = (x_gates + h_gates).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == "gru":
        xr, xz, xn = x_gates.chunk(3, dim=-1)
        hr, hz, hn = h_gates.chunk(3, dim=-1)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return n + torch.sigmoid(xz + hz) * (h - n), None
    gates = x_gates + h_gates
    return (torch.tanh(gates) if cell == "rnn_tanh" else torch.relu(gates)), None


def step(
    cell: Cell, x_gates: Tensor, hh: Callable[[Tensor], Tensor], h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One step; with the operators' gate functions where the hidden weights are integers."""
    if isinstance(hh, QuantizedLinear):
        return ops.recurrent_cell(x_gates, hh(h), h if cell == "gru" else c, cell=cell)
    return cell_step(cell, x_gates, hh(h), h, c)


def in_torch(*parts: nn.Module | None) -> bool:
    """Whether `run_in_torch` can take the parts: all 16-bit floats, and nobody waits for their inputs and outputs."""
    return all(
        part is None or (isinstance(part, HalfLinear) and not part._forward_hooks and not part._forward_pre_hooks)
        for part in parts
    )


def run_in_torch(
    cell: Cell,
    ih: HalfLinear,
    hh: HalfLinear,
    hr: HalfLinear | None,
    x: Tensor,
    state: tuple[Tensor, ...],
    batch_sizes: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Output and new state by torch's LSTM, GRU or RNN: in bfloat16, or with float16 weights widened to float32.

    torch has fast steps in bfloat16 and none in float16, where widening the weights at each call costs less.

    Args:
        cell: Which equations.
        ih: Input half of the gates.
        hh: Hidden half.
        hr: Projection of an LSTM.
        x: `[T, B, I]`, or the rows of a packed sequence.
        state: `[B, H]` each.
        batch_sizes: Of a packed sequence; then `reverse` must be False.
        reverse: Begin at the last step.
    """
    dtype = torch.bfloat16 if hh.weight.dtype == torch.bfloat16 else torch.float32
    biases = [] if ih.bias is None or hh.bias is None else [ih.bias, hh.bias]
    weights = [w.to(dtype) for w in (ih.weight, hh.weight, *biases, *(() if hr is None else (hr.weight,)))]
    x, states = x.to(dtype), [s.to(dtype).unsqueeze(0) for s in state]
    hx = states if cell == "lstm" else states[0]
    function = getattr(torch._VF, cell)
    if batch_sizes is None:
        x = x.flip(0) if reverse else x
        output, *new = function(x, hx, weights, bool(biases), 1, 0.0, False, False, False)
        output = output.flip(0) if reverse else output
    else:
        output, *new = function(x, batch_sizes, hx, weights, bool(biases), 1, 0.0, False, False)
    return output, *(s.squeeze(0) for s in new)


def run_steps(
    cell: Cell,
    x_gates: Tensor,
    hh: nn.Module,
    hr: nn.Module | None,
    h: Tensor,
    c: Tensor | None,
    batch_sizes: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The steps one after another; step t of a packed sequence has the first `batch_sizes[t]` rows, others keep their state."""
    steps = list(x_gates.unbind(0)) if batch_sizes is None else list(torch.split(x_gates, batch_sizes.tolist()))
    outputs: list[Tensor] = []
    hidden, projection = for_steps(hh), None if hr is None else for_steps(hr)
    for gates in reversed(steps) if reverse else steps:
        rows = gates.shape[0]
        new_h, new_c = step(cell, gates, hidden, h[:rows], None if c is None else c[:rows])
        if projection is not None:
            new_h = projection(new_h)
        outputs.append(new_h)
        h = new_h if rows == h.shape[0] else torch.cat((new_h, h[rows:]))
        if c is not None and new_c is not None:
            c = new_c if rows == c.shape[0] else torch.cat((new_c, c[rows:]))
    if reverse:
        outputs.reverse()
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), h, c
