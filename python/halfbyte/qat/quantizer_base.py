"""What all quantizers share: what a layer asks of them, and what their ranges and scales are taken from."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.errors import QuantizationError
from halfbyte.formats import IntFormat, PackedFormat
from halfbyte.nn.packed_weight import WeightCodes
from halfbyte.qat.functions import FakeQuantize


class WeightQuantizer(nn.Module):
    """Base of the quantizers of weights `[O, I]`.

    `fake` and `codes` round alike: what a layer trains with is what its integers stand for.

    Args:
        weight_format: Format of the weight.
        shape: `(O, I)`.
    """

    def __init__(self, weight_format: PackedFormat, shape: tuple[int, int]) -> None:
        super().__init__()
        self.format, self.shape = weight_format, shape

    def initialize(self, weight: Tensor) -> None:
        """Sets what is trained from the float weight; called once, by `prepare_qat_`."""

    def fake(self, weight: Tensor) -> FakeQuantize:
        """What fake quantization does to this weight now."""
        raise NotImplementedError

    def codes(self, weight: Tensor) -> WeightCodes:
        """Integers and stored qparams of a weight: what the module computes with in evaluation mode and after `convert_`."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, differentiable."""
        return self.fake(weight)(weight)

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return str(self.format)


class ActivationQuantizer(Protocol):
    """What a QAT module asks of the quantizer of its input."""

    def fake(self, x: Tensor) -> FakeQuantize:
        """What fake quantization does to this input now; in training mode, notes its range first."""
        ...

    def qparams(self) -> tuple[Tensor, Tensor] | None:
        """`act_scale` and `act_zero_point` of the converted module, None where they are found at run time."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it has seen what it needs to quantize."""
        ...


class StaticActivation:
    """What quantizers with one range for all inputs share: what they are converted to."""

    format: IntFormat
    name: str
    batches: Tensor  # seen

    def _current(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range now."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether a batch was seen."""
        return bool(self.batches)

    @torch.no_grad()
    def qparams(self) -> tuple[Tensor, Tensor]:
        """`act_scale` and `act_zero_point`, that of signed codes.

        Raises:
            QuantizationError: no batch was seen.
        """
        if not self.ready:
            raise QuantizationError(
                f"the range of {self.name} was never observed: run training batches that reach it, or leave the layer out"
            )
        scale, zero_point = self._current()
        shift = 0 if self.format.symmetric else 1 << (self.format.bits - 1)
        return scale, zero_point.to(torch.int32) - shift


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: a checkpointed block once more, whose data counted already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def shares_ranges() -> bool:
    """Whether ranges are those of several processes: of the default `torch.distributed` group, if there is one."""
    return (
        not torch.compiler.is_compiling()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def all_reduced_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of x over all processes that share ranges; all of them must call, with an empty x, too.

    Where all are empty, the range is from infinity to minus infinity.
    """
    if x.numel():
        low, high = ops.observe_minmax(in_memory_order(x))
    else:
        low, high = torch.tensor(math.inf), torch.tensor(-math.inf)
    if not shares_ranges():
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def all_reduced_mean(mean: Tensor, x: Tensor) -> Tensor:
    """The mean over all processes that share ranges of what was computed from x; an empty x does not count. All must call."""
    if not shares_ranges():
        return mean
    total = torch.stack([mean, torch.ones_like(mean)]) if x.numel() else torch.zeros(2, *mean.shape)
    dist.all_reduce(total)
    return total[0] / total[1]


def in_memory_order(x: Tensor) -> Tensor:
    """A view with the elements in the order of memory, where there is one."""
    if x.is_contiguous():
        return x
    return x.permute(sorted(range(x.dim()), key=lambda d: -x.stride()[d]))
