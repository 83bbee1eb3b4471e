"""Quantizers of layers' inputs whose range is trained: LSQ, LSQ+ and PACT.

LSQ (arXiv:1902.08153) trains the scale of symmetric formats, LSQ+ (arXiv:2004.09576) where the range of asymmetric ones begins
as well, PACT (arXiv:1805.06085) where positive activations are cut off.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.errors import QuantizationError
from halfbyte.formats import IntFormat
from halfbyte.qat.functions import FakeQuantize
from halfbyte.qat.learned import LearnedAffine, positive_scale, zero_point_of_offset
from halfbyte.qat.quantizer_base import all_reduced_range, in_memory_order, recomputing


class LearnedActivation(nn.Module):
    """One trained scale for all inputs and, of asymmetric formats, where the range begins: LSQ and LSQ+.

    The first batch gives the first range: symmetric as LSQ has it, `scale = 2 mean|x| / sqrt(qmax)`; asymmetric the mean ±
    three standard deviations, where the values reach as far, and at 8 bits their extremes. Between processes of a
    `torch.distributed` group it is that of all their first batches. The gradient is divided by `sqrt(n * qmax)` for the `n`
    elements of one sample. Parameters: `scale`, whose magnitude is the scale, and `offset`, the value of the lowest code.

    Args:
        activation_format: Format per tensor.
        name: What error messages call the tensor.
    """

    batches: Tensor

    def __init__(self, activation_format: IntFormat, *, name: str) -> None:
        super().__init__()
        self.format, self.name = activation_format, name
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = None if activation_format.symmetric else nn.Parameter(torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))  # 0 or 1: whether the first was seen

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        if self.training and x.numel() and not recomputing() and (torch.compiler.is_compiling() or not self.batches):
            self._initialize(x.detach())
        f = self.format
        scale, zero_point = self._current()
        grad_factor = 1 / math.sqrt(max(x.numel() // max(x.shape[0], 1), 1) * (f.qmax if f.symmetric else f.qmax / 2))
        return LearnedAffine(scale, zero_point, f.qmin, f.qmax, None, "rounded", grad_factor)

    def _current(self) -> tuple[Tensor, Tensor]:
        scale = positive_scale(self.scale)
        if self.offset is None:
            return scale, torch.zeros_like(scale)
        return scale, zero_point_of_offset(self.offset, scale, self.format.qmin, self.format.qmax)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        scale, offset = self._first_range(x)
        usable = (self.batches == 0) & torch.isfinite(scale) & torch.isfinite(offset) & (scale > 0)
        self.scale.copy_(torch.where(usable, scale, self.scale))
        if self.offset is not None:
            self.offset.copy_(torch.where(usable, offset, self.offset))
        self.batches.copy_(torch.where(usable, 1, self.batches))

    def _first_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f, x = self.format, x.float()
        if f.symmetric:
            mean = _all_reduced_mean(x.abs().mean())
            return 2 * mean / math.sqrt(f.qmax), torch.zeros_like(mean)
        low, high = all_reduced_range(*ops.observe_minmax(in_memory_order(x)))
        if f.bits < 8:
            mean, square = _all_reduced_mean(x.mean()), _all_reduced_mean(x.square().mean())
            reach = 3 * torch.sqrt(torch.clamp(square - mean.square(), min=0.0))
            low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
        low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
        return (high - low) / (f.qmax - f.qmin), low

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

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return f"{self.format}, learned"


class PactActivation(LearnedActivation):
    """Inputs cut off at a trained value: `clip(x, 0, alpha)`, in steps of `alpha / qmax`.

    `scale`, the parameter, is `alpha`, which learns from what is cut off alone; the paper adds L2 regularisation of it to the
    loss. The first batch's largest value is the first one. Negative inputs become 0: for what follows a ReLU.

    Args:
        activation_format: Asymmetric, per tensor.
        name: What error messages call the tensor.

    Raises:
        ValueError: a symmetric format.
    """

    def __init__(self, activation_format: IntFormat, *, name: str) -> None:
        if activation_format.symmetric:
            raise ValueError(
                f"activations='pact' is for asymmetric formats, of inputs that are not negative, not for {activation_format}; "
                "use 'learned'"
            )
        super().__init__(activation_format, name=name)
        self.offset = None

    def fake(self, x: Tensor) -> FakeQuantize:
        """See `ActivationQuantizer`."""
        fake = super().fake(x)
        assert isinstance(fake, LearnedAffine)
        return LearnedAffine(fake.scale, fake.zero_point, fake.qmin, fake.qmax, None, "pact")

    def _current(self) -> tuple[Tensor, Tensor]:
        scale = positive_scale(self.scale) / self.format.qmax
        return scale, torch.zeros_like(scale)

    def _first_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, high = all_reduced_range(*ops.observe_minmax(in_memory_order(x)))
        return high, torch.zeros_like(high)

    def extra_repr(self) -> str:
        """Format, for `print(model)`."""
        return f"{self.format}, PACT"


def _all_reduced_mean(mean: Tensor) -> Tensor:
    """The mean over all processes of the default `torch.distributed` group, if there is one; all of them must call."""
    if torch.compiler.is_compiling() or not dist.is_available() or not dist.is_initialized():
        return mean
    total = mean.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
