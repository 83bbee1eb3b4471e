"""Folds: where a scale of each channel can move from a layer's inputs into what produces them, the model unchanged.

A *producer* gives channels that can be scaled by scaling its parameters: a linear layer (its rows), or any module whose
parameters are vectors over its output channels and multiply them (LayerNorm, every RMSNorm). Its *consumers* are the linear
layers that read those channels, through anything that keeps each channel apart and linear: nothing, a gate, ReLU, the
average over tokens that attention takes. `probing.py` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.edits import WeightEdits
from halfbyte.errors import QuantizationError
from halfbyte.outputs import output_tensors

_LARGEST_CHANGE = (
    1e-4  # of the model's outputs, relative to the largest: what rounding may do, and an error cannot stay under
)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear layer that reads scaled channels.

    Attributes:
        name: Qualified name.
        channel_of: `[I]` int64, the producer's channel behind each input.
        same_input_as: Name of the first consumer that gets the very same tensor; its own name if that is itself.
    """

    name: str
    channel_of: Tensor
    same_input_as: str


@dataclass(frozen=True, slots=True)
class Fold:
    """A producer and all that reads it.

    Attributes:
        producer: Qualified name.
        channels: Number of channels it gives.
        consumers: All of them; each must be scaled.
        offsets: By name, what is added to a parameter before it multiplies the output: 1 for gains stored less one, else 0.
    """

    producer: str
    channels: int
    consumers: tuple[Consumer, ...]
    offsets: dict[str, float]

    def apply(self, model: nn.Module, scale: Tensor, edits: WeightEdits) -> Callable[[], None]:
        """Divides the producer's channels by `scale` `[channels]` and multiplies the consumers' columns.

        Returns:
            What takes just this back.
        """
        producer = model.get_submodule(self.producer)
        changes: list[tuple[nn.Parameter, Tensor]] = []
        for name, offset in self.offsets.items():
            parameter = producer._parameters[name]
            assert parameter is not None
            divisor = scale if parameter.dim() == 1 else scale[:, None]
            changes.append((parameter, (parameter.detach().float() + offset) / divisor - offset))
        for consumer in self.consumers:
            parameter = model.get_submodule(consumer.name)._parameters["weight"]
            assert parameter is not None
            changes.append((parameter, parameter.detach().float() * scale[consumer.channel_of]))
        before = [(parameter, parameter.detach().clone()) for parameter, _ in changes]
        for parameter, value in changes:
            edits.write(parameter, value)

        def undo() -> None:
            for parameter, value in before:
                edits.write(parameter, value)

        return undo


@dataclass(frozen=True, slots=True)
class NoFold:
    """A producer that cannot be scaled, and why."""

    producer: str
    reason: str


class Example:
    """A run of the model whose outputs a change is held against.

    Args:
        run: Runs the model on the example; evaluation mode and no gradients are the caller's.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        self.outputs = self._outputs()
        if not self.outputs:
            raise QuantizationError("the model returns no tensor, so that nothing shows whether a change alters it")
        for name, output in self.outputs.items():
            if not torch.isfinite(output).all():
                raise QuantizationError(f"the model's {name} has NaN or inf on the first batch of data")

    def _outputs(self) -> dict[str, Tensor]:
        tensors = output_tensors(self.run())
        return {name: t.detach().clone() for name, t in tensors.items() if t.is_floating_point() and t.numel()}

    def change(self) -> float:
        """Largest difference of an output to what it was, relative to the output's largest value."""
        return max(relative_change(new, self.outputs[name]) for name, new in self._outputs().items())

    def prove(self, undo: Callable[[], None]) -> tuple[float, str]:
        """Runs the changed model; calls `undo` unless its outputs are what they were, up to rounding.

        Returns:
            The relative change, and why it was undone; empty if it was not.
        """
        change = self.change()
        if change <= _LARGEST_CHANGE:
            return change, ""
        undo()
        return change, f"it changes the float model's output by {change:.1e} of its largest value: undone"


def relative_change(new: Tensor, old: Tensor) -> float:
    """Largest difference, relative to the largest value of `old`; inf for NaN, or another shape."""
    if new.shape != old.shape:
        return float("inf")
    change = ((new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-30)).item()
    return change if change == change else float("inf")
