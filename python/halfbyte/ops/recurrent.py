"""The steps of recurrent layers with integer hidden weights."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import refuse_gradient
from halfbyte.ops.checks import check_bits, check_codebook, check_float

__all__ = ["Cell", "Projection", "recurrent", "recurrent_cell"]

_recurrent = torch.ops.halfbyte.recurrent.default
_recurrent_cell = torch.ops.halfbyte.recurrent_cell.default

Cell = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
_INDEX: dict[Cell, int] = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}  # enum Cell of recurrent.h
_GATES = (4, 3, 1, 1)


class Projection(NamedTuple):
    """Weights `[P, H]` that project an LSTM's hidden state, in the tiles layout; fields as those of `recurrent`."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    int8: bool
    act_scale: Tensor | None = None
    act_zero_point: Tensor | None = None
    codebook: Tensor | None = None
    asymmetric: bool = False


_NO_PROJECTION = (None, None, None, 0, 0, False, None, None, None, False)


def recurrent(
    x_gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    cell: Cell,
    bits: int,
    group_size: int,
    int8: bool,
    act_scale: Tensor | None = None,
    act_zero_point: Tensor | None = None,
    asymmetric: bool = False,
    reverse: bool = False,
    batch_sizes: Tensor | None = None,
    codebook: Tensor | None = None,
    projection: Projection | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All steps of one recurrent layer in one direction, given the input half of its gates.

    Equal, integer for integer, to `recurrent_cell` after `linear_int8` (or `linear_weight_only`) at every step.

    Args:
        x_gates: `[T, B, gates * H]`: inputs times input weights plus their bias, in PyTorch's order of the gates, float32. Of
            a packed sequence `[sum(batch_sizes), gates * H]`.
        h: `[B, H]` float32, hidden state before the first step.
        c: `[B, H]` float32, cell state of an LSTM; None for other cells.
        qweight: Hidden weights `[gates * H, H]` in the tiles layout.
        scale: `[G, gates * H]`; float32, float16 or bfloat16.
        zero_point: uint8 of the same shape, or None.
        bias: `[gates * H]` floating point, or None.
        cell: Which equations.
        bits: Width of a code.
        group_size: Inputs that share a scale.
        int8: Whether the hidden state is quantized at every step: per row, or with `act_scale`.
        act_scale: One float32 number, scale of the hidden state; None finds one for each row.
        act_zero_point: One int32 number in [-128, 127]; None is 0.
        asymmetric: Without `act_scale`: a zero point for each row too, as in `linear_int8`.
        reverse: Begin at the last step.
        batch_sizes: `[T]` int64, rows of each step of a packed sequence.
        codebook: As in `linear_weight_only`; `int8` must be False then.
        projection: Of an LSTM with `proj_size` P: what the hidden state is multiplied with at the end of a step. `h` and the
            outputs have P columns then, and `qweight` is `[gates * H, P]`.

    Returns:
        Hidden states of all steps (`[T, B, H]`, or without T and B apart), and the last hidden and cell state.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `cell` is unknown, or has a cell state and is given none, or the reverse.
        RuntimeError: Shapes that do not fit.

    Example:
        >>> weight = torch.randint(-8, 8, (4 * 32, 32), dtype=torch.int8)
        >>> packed = hb.ops.pack(weight, 4, layout="tiles")
        >>> scale, state = torch.full((1, 4 * 32), 0.05), torch.zeros(2, 32)
        >>> y, h, c = hb.ops.recurrent(
        ...     torch.randn(7, 2, 4 * 32), state, state, packed, scale, None, None,
        ...     cell="lstm", bits=4, group_size=32, int8=True,
        ... )
        >>> y.shape, bool((y[-1] == h).all())
        (torch.Size([7, 2, 32]), True)
    """
    _check_state("c", c, cell, ("lstm",))
    check_bits(bits)
    check_float(x_gates, "x_gates")
    check_codebook(codebook, bits, zero_point)
    if projection is not None:
        check_bits(projection.bits)
        check_codebook(projection.codebook, projection.bits, projection.zero_point)
    y, h_n, c_n = _recurrent(
        x_gates,
        h,
        c,
        qweight,
        scale,
        zero_point,
        bias,
        _INDEX[cell],
        bits,
        group_size,
        int8,
        act_scale,
        act_zero_point,
        reverse,
        batch_sizes,
        codebook,
        *(projection or _NO_PROJECTION)[:-1],
        asymmetric,
        projection is not None and projection.asymmetric,
    )
    return y, h_n, None if c is None else c_n


def recurrent_cell(
    x_gates: Tensor, h_gates: Tensor, state: Tensor | None, *, cell: Cell
) -> tuple[Tensor, Tensor | None]:
    """One step of a recurrent cell, given both halves of its gates; the functions that `recurrent` applies.

    Args:
        x_gates: `[..., gates * H]` float32, inputs times input weights plus their bias.
        h_gates: The same of the hidden state.
        state: `[..., H]` float32: cell state of an LSTM, hidden state of a GRU; None for an RNN, which reads neither.
        cell: Which equations.

    Returns:
        Hidden state after the step, and cell state of an LSTM.

    Raises:
        ValueError: `cell` is unknown, or needs a state and is given none, or the reverse.
        RuntimeError: Shapes or dtypes that do not fit.

    Example:
        >>> h, _ = hb.ops.recurrent_cell(torch.zeros(2, 8), torch.ones(2, 8), None, cell="rnn_relu")
        >>> bool((h == 1).all())
        True
    """
    _check_state("state", state, cell, ("lstm", "gru"))
    h, c = _recurrent_cell(x_gates, h_gates, state, _INDEX[cell])
    return h, c if cell == "lstm" else None


def _check_state(name: str, state: Tensor | None, cell: Cell, cells: tuple[Cell, ...]) -> None:
    if cell not in _INDEX:
        raise ValueError(f"cell={cell!r} is unknown; use {', '.join(map(repr, _INDEX))}")
    if (state is not None) != (cell in cells):
        raise ValueError(f"cell={cell!r} " + (f"needs {name}" if cell in cells else f"takes no {name}: pass None"))


def _recurrent_fake(
    x_gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    cell: int,
    bits: int,
    group_size: int,
    int8: bool,
    act_scale: Tensor | None,
    act_zero_point: Tensor | None,
    reverse: bool,
    batch_sizes: Tensor | None,
    codebook: Tensor | None,
    *projection: object,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x_gates.new_empty((*x_gates.shape[:-1], h0.shape[-1]))
    return y, h0.new_empty(h0.shape), h0.new_empty((0,) if c0 is None else c0.shape)


def _recurrent_cell_fake(x_gates: Tensor, h_gates: Tensor, state: Tensor | None, cell: int) -> tuple[Tensor, Tensor]:
    h = x_gates.new_empty((*x_gates.shape[:-1], x_gates.shape[-1] // _GATES[cell]))
    return h, x_gates.new_empty(h.shape if cell == _INDEX["lstm"] else (0,))


_NO_GRADIENT = (
    "quantized recurrent layers have no gradient; leave them in float where gradients must pass, with "
    "hb.Recipe(..., overrides={nn.LSTM: None})"
)

torch.library.register_fake("halfbyte::recurrent", _recurrent_fake)
torch.library.register_fake("halfbyte::recurrent_cell", _recurrent_cell_fake)
refuse_gradient("recurrent", _NO_GRADIENT)
refuse_gradient("recurrent_cell", _NO_GRADIENT)
