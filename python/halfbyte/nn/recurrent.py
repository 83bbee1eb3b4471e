"""LSTM, GRU and RNN with their weights in parts: one linear layer for the inputs and one for the hidden state.

`gates = ih(x) + hh(h)`, each with its own bias, as PyTorch defines them; the gates' functions are in float32. `ih` runs once
for a whole sequence. Where `hh` has integer weights, all steps run in one operator, which quantizes the hidden state per token
where the scheme says so, and the projection's input. Layers of 16-bit floats are computed by torch; what is mixed, step after
step in Python, with the same integers (recurrent_steps.py).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from halfbyte import ops
from halfbyte.nn.as_layers import as_linear
from halfbyte.nn.linear import HalfLinear, QuantizedLinear
from halfbyte.nn.recurrent_steps import in_torch, run_in_torch, run_steps, step
from halfbyte.nn.trained_parts import run_parts
from halfbyte.ops import Cell


class QuantizedRecurrent(nn.Module):
    """What LSTM, GRU and RNN share. Takes the place of the `torch.nn` module it is made from.

    Layer `k` has the parts `ih_l{k}` and `hh_l{k}` (and `hr_l{k}`, the projection, where `proj_size` is set), with the suffix
    `_reverse` for the other direction: `ih_l0.weight` is what was `weight_ih_l0`.

    Args:
        rnn: Module whose weights and settings are taken over.
    """

    mode: str

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.mode = rnn.mode
        self.input_size, self.hidden_size = rnn.input_size, rnn.hidden_size
        self.num_layers, self.bias, self.batch_first = rnn.num_layers, rnn.bias, rnn.batch_first
        self.dropout, self.bidirectional, self.proj_size = rnn.dropout, rnn.bidirectional, rnn.proj_size
        for suffix in self._suffixes():
            for part in ("ih", "hh", "hr") if self.proj_size else ("ih", "hh"):
                bias = None if part == "hr" else getattr(rnn, f"bias_{part}_{suffix}", None)
                setattr(self, f"{part}_{suffix}", as_linear(getattr(rnn, f"weight_{part}_{suffix}"), bias))

    @property
    def cell(self) -> Cell:
        """Which equations a step follows."""
        cells: dict[str, Cell] = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
        return cells[self.mode]

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are packed once, when they are quantized. Models call it."""

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _run(
        self, input: Tensor | PackedSequence, hidden: tuple[Tensor, ...] | None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        """All layers. `hidden` holds one tensor, or two for an LSTM; shapes and dtypes are PyTorch's."""
        name = type(self).__name__
        packed = input if isinstance(input, PackedSequence) else None
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: input is {given}; use a floating-point tensor or PackedSequence")
        if packed is None and x.dim() not in (2, 3):
            raise ValueError(f"{name}: input has {x.dim()} dimensions; use [T, B, I], batch_first [B, T, I] or [T, I]")
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input has {x.shape[-1]} features in its last dimension; {self.input_size} are needed"
            )
        batched = packed is not None or x.dim() == 3
        if packed is not None and x.dim() != 2:
            raise ValueError(
                f"{name}: data of the packed sequence has shape {tuple(x.shape)}; use [rows, {self.input_size}]"
            )
        if x.shape[1 if self.batch_first and packed is None and batched else 0] == 0:
            raise ValueError(f"{name}: input of shape {tuple(x.shape)} has no steps; give at least one")
        if packed is None:
            x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
            batch = x.shape[1]
        else:
            if packed.batch_sizes.dtype != torch.int64:
                raise TypeError(
                    f"{name}: batch_sizes of the packed sequence are {packed.batch_sizes.dtype}; use torch.int64"
                )
            if not torch.compiler.is_compiling():
                _check_batch_sizes(name, packed.batch_sizes.tolist(), x.shape[0])
            batch = int(packed.batch_sizes[0])
        states = self._initial(hidden, x, batch, batched)
        if packed is not None and packed.sorted_indices is not None and hidden is not None:
            states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        output, states = self._layers(x, states, None if packed is None else packed.batch_sizes)
        if packed is not None:
            if packed.unsorted_indices is not None:
                states = tuple(state.index_select(1, packed.unsorted_indices) for state in states)
            return PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), states
        if not batched:
            return output.squeeze(1), tuple(state.squeeze(1) for state in states)
        return (output.transpose(0, 1) if self.batch_first else output), states

    def _initial(self, hidden: tuple[Tensor, ...] | None, x: Tensor, batch: int, batched: bool) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size) if self.cell == "lstm" else (self.hidden_size,)
        if hidden is None:
            return tuple(x.new_zeros(layers, batch, size) for size in sizes)
        for label, state, size in zip(("h_0", "c_0"), hidden, sizes, strict=False):
            expected = (layers, batch, size) if batched else (layers, size)
            _check_state(f"{type(self).__name__}: {label}", state, expected, x)
        return hidden if batched else tuple(state.unsqueeze(1) for state in hidden)

    def _layers(
        self, x: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        directions = 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(directions):
                suffix = f"l{layer}" + ("_reverse" if direction else "")
                state = tuple(s[layer * directions + direction] for s in states)
                output, state = self._direction(x, suffix, state, batch_sizes, reverse=direction == 1)
                outputs.append(output)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _direction(
        self, x: Tensor, suffix: str, state: tuple[Tensor, ...], batch_sizes: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: `x` is `[T, B, I]`, or `[sum of batch_sizes, I]`; a state `[B, H]`."""
        ih, hh = self._part(f"ih_{suffix}"), self._part(f"hh_{suffix}")
        hr = self._part(f"hr_{suffix}") if self.proj_size else None

        def run(ih: nn.Module, hh: nn.Module, hr: nn.Module | None) -> tuple[Tensor, ...]:
            return self._run_direction(ih, hh, hr, x, state, batch_sizes, reverse)

        output, *new = run_parts(run, ih, hh, hr)
        return output, tuple(new)

    def _run_direction(
        self,
        ih: nn.Module,
        hh: nn.Module,
        hr: nn.Module | None,
        x: Tensor,
        state: tuple[Tensor, ...],
        batch_sizes: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        """Output and new state."""
        dtype = x.dtype
        if in_torch(ih, hh, hr) and (batch_sizes is None or not reverse):
            assert isinstance(ih, HalfLinear) and isinstance(hh, HalfLinear) and isinstance(hr, HalfLinear | None)
            results = run_in_torch(self.cell, ih, hh, hr, x, state, batch_sizes, reverse=reverse)
            return tuple(result.to(dtype) for result in results)
        if isinstance(hh, QuantizedLinear):  # integers between float32 gates, whatever the dtype outside
            x, state = x.float(), tuple(s.float() for s in state)
        x_gates = ih(x)
        h, c = state[0], state[1] if len(state) == 2 else None
        if _in_one_operator(hh) and (hr is None or _in_one_operator(hr)):
            assert isinstance(hh, QuantizedLinear) and (hr is None or isinstance(hr, QuantizedLinear))
            output, h, c = ops.recurrent(
                x_gates,
                h,
                c,
                hh.qweight,
                hh.scale,
                hh.zero_point,
                hh.bias,
                cell=self.cell,
                bits=hh.bits,
                group_size=hh.group_size,
                int8=hh.scheme.activation is not None,
                act_scale=hh.act_scale,
                act_zero_point=hh.act_zero_point,
                asymmetric=hh.scheme.asymmetric_rows,
                reverse=reverse,
                batch_sizes=batch_sizes,
                codebook=hh.codebook,
                projection=None if hr is None else _projection(hr),
            )
        else:
            output, h, c = run_steps(self.cell, x_gates, hh, hr, h, c, batch_sizes, reverse=reverse)
        return output.to(dtype), *(s.to(dtype) for s in (h, c) if s is not None)

    def _part(self, name: str) -> nn.Module:
        part = self._modules[name]
        assert part is not None
        return part

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        settings = [str(self.input_size), str(self.hidden_size)]
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "proj_size": 0,
        }
        settings += [
            f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default
        ]
        return ", ".join(settings)


def _in_one_operator(part: nn.Module) -> bool:
    """Whether the operator for whole sequences can take the part: it clips activations to 8 bits, no fewer."""
    if not isinstance(part, QuantizedLinear):
        return False
    return part.scheme.activation is None or part.scheme.activation.bits == 8


def _projection(hr: QuantizedLinear) -> ops.Projection:
    return ops.Projection(
        hr.qweight,
        hr.scale,
        hr.zero_point,
        hr.bits,
        hr.group_size,
        int8=hr.scheme.activation is not None,
        act_scale=hr.act_scale,
        act_zero_point=hr.act_zero_point,
        codebook=hr.codebook,
        asymmetric=hr.scheme.asymmetric_rows,
    )


class QuantizedLSTM(QuantizedRecurrent):
    """`nn.LSTM` with quantized weights.

    Args:
        rnn: The LSTM whose place it takes.

    Shapes:
        As in `nn.LSTM`: input `[T, B, I]`, `[B, T, I]` if `batch_first`, `[T, I]`, or a `PackedSequence`; states
        `[layers * directions, B, H]`. float32, bfloat16 or float16; the gates are computed in float32.

    Example:
        >>> model = nn.ModuleDict({"lstm": nn.LSTM(64, 64, num_layers=2, batch_first=True)})
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> output, (h, c) = model["lstm"](torch.randn(2, 5, 64))
        >>> output.shape, h.shape
        (torch.Size([2, 5, 64]), torch.Size([2, 2, 64]))
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Output of the last layer at every step, and `(h_n, c_n)`.

        Raises:
            ValueError: wrong shape of the input or the initial state.
            TypeError: wrong dtype of either.
        """
        if hx is not None and not (isinstance(hx, tuple | list) and len(hx) == 2):
            raise TypeError(f"{type(self).__name__}: hx is a {type(hx).__name__}; give the pair (h_0, c_0)")
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class QuantizedGRU(QuantizedRecurrent):
    """`nn.GRU` with quantized weights; see `QuantizedLSTM`."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output of the last layer at every step, and `h_n`; raises as `QuantizedLSTM` does."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h


class QuantizedRNN(QuantizedGRU):
    """`nn.RNN` with quantized weights, tanh or ReLU; see `QuantizedLSTM`."""


class _QuantizedCell(nn.Module):
    """What the cells share: parts `ih` and `hh`."""

    cell: Cell

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell | nn.RNNCell) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = cell.input_size, cell.hidden_size, cell.bias
        self.ih = as_linear(cell.weight_ih, cell.bias_ih)
        self.hh = as_linear(cell.weight_hh, cell.bias_hh)

    def _run(self, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        name = type(self).__name__
        if not isinstance(input, Tensor) or not input.is_floating_point():
            given = str(input.dtype) if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"{name}: input is {given}; use a floating-point tensor")
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input has shape {tuple(input.shape)}; use [B, {self.input_size}] or [{self.input_size}]"
            )
        shape, dtype = (*input.shape[:-1], self.hidden_size), input.dtype
        count = 2 if self.cell == "lstm" else 1
        if states is None:
            states = tuple(input.new_zeros(shape) for _ in range(count))
        for label, state in zip(("h", "c"), states, strict=False):
            _check_state(f"{name}: {label}", state, shape, input)
        before = states

        def run(ih: nn.Module, hh: nn.Module) -> tuple[Tensor, ...]:
            x, (h, *rest) = input, before
            if isinstance(hh, QuantizedLinear):
                x, h, rest = x.float(), h.float(), [c.float() for c in rest]
            new = step(self.cell, ih(x), hh, h, rest[0] if rest else None)
            return tuple(state.to(dtype) for state in new if state is not None)

        return run_parts(run, self.ih, self.hh)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class QuantizedLSTMCell(_QuantizedCell):
    """`nn.LSTMCell` with quantized weights.

    Args:
        cell: The cell whose place it takes.

    Shapes:
        input `[B, I]` or `[I]`, states `[B, H]` or `[H]`; float32, bfloat16 or float16, gates in float32.

    Example:
        >>> model = nn.ModuleDict({"cell": nn.LSTMCell(64, 64)})
        >>> _ = hb.quantize_(model, hb.int4_weight_only(32), progress=False)
        >>> h, c = model["cell"](torch.randn(2, 64))
        >>> h.shape
        torch.Size([2, 64])
    """

    cell: Cell = "lstm"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`(h, c)` after the step; raises as `QuantizedLSTM` does."""
        if hx is not None and not (isinstance(hx, tuple | list) and len(hx) == 2):
            raise TypeError(f"{type(self).__name__}: hx is a {type(hx).__name__}; give the pair (h, c)")
        h, c = self._run(input, hx)
        return h, c


class QuantizedGRUCell(_QuantizedCell):
    """`nn.GRUCell` with quantized weights; see `QuantizedLSTMCell`."""

    cell: Cell = "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """`h` after the step; raises as `QuantizedLSTM` does."""
        (h,) = self._run(input, None if hx is None else (hx,))
        return h


class QuantizedRNNCell(QuantizedGRUCell):
    """`nn.RNNCell` with quantized weights, tanh or ReLU; see `QuantizedLSTMCell`."""

    def __init__(self, cell: nn.RNNCell) -> None:
        super().__init__(cell)
        self.nonlinearity = cell.nonlinearity
        self.cell = "rnn_tanh" if cell.nonlinearity == "tanh" else "rnn_relu"


def _check_batch_sizes(name: str, sizes: list[int], rows: int) -> None:
    for index, (before, size) in enumerate(pairwise([*sizes[:1], *sizes])):
        if not 1 <= size <= before:
            raise ValueError(
                f"{name}: batch_sizes[{index}]={size} of the packed sequence is not in 1..{before}; every sequence has at "
                "least one step, and sizes do not grow"
            )
    if sum(sizes) != rows:
        raise ValueError(f"{name}: batch_sizes of the packed sequence add up to {sum(sizes)}, its data has {rows} rows")


def _check_state(label: str, state: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{label} is a {type(state).__name__}; give a tensor of shape {shape}")
    if tuple(state.shape) != shape:
        raise ValueError(f"{label} has shape {tuple(state.shape)}; {shape} is needed")
    if state.dtype != x.dtype:
        raise TypeError(f"{label} has dtype {state.dtype}, the input {x.dtype}; give both the same")
    if state.device != x.device:
        raise ValueError(f"{label} is on the device {state.device}, the input on {x.device}; give both the same")
