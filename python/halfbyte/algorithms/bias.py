"""Bias correction: what rounding a weight adds to its outputs on average is taken off the bias.

Nagel et al. 2019 (arXiv:1906.04721), with the mean inputs measured on calibration data: `E[Ŵ x] - E[W x] = (Ŵ - W) E[x]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfbyte.calibration import tokens_of
from halfbyte.convolution import ConvGeometry, ConvModule


@dataclass(frozen=True, slots=True)
class BiasCorrection:
    """Takes the mean error of each output channel off its bias. Goes with any rounding, anywhere in the same list.

    What is left of the error is its variance, so `MSE` weights errors by the variance of an input then, not by its mean square.
    Recurrent nets gain most: a good part of what a hidden state carries is its mean, so that rounding shifts every gate.

    Layers without a bias are left as they are, with a fallback that says so; fold batch normalization first (`hb.fuse_`).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> data = [torch.rand(32, 64) for _ in range(4)]
        >>> algorithms = [hb.algorithms.BiasCorrection(), hb.RTN()]
        >>> report = hb.quantize_(model, hb.int4_int8_static(), data, algorithms=algorithms, progress=False)
    """

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True


class InputMean:
    """Mean of each input of a layer, over all tokens or pixels seen; registered as a forward pre-hook.

    Constant memory. Taps of a convolution that lie outside the input count as the zeros that they read.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [groups, I] float64
        self._rows = 0

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The hook: adds the first positional argument."""
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        x = args[0].detach()
        if isinstance(module, ConvModule):
            geometry = ConvGeometry.of(module)
            x = x.unsqueeze(0) if x.dim() == geometry.dims + 1 else x
            rows = geometry.rows(x.sum(0, keepdim=True, dtype=torch.float64))  # unfolding is linear
            total, count = rows.sum(1), rows.shape[1] * x.shape[0]
        else:
            rows = tokens_of(x)
            total, count = rows.sum(0, keepdim=True, dtype=torch.float64), rows.shape[0]
        self._sum = total if self._sum is None else self._sum + total
        self._rows += count

    def begin_share(self) -> None:
        """Sets aside what was seen, until `end_share`."""
        self._aside = (self._sum, self._rows)
        self._sum, self._rows = None, 0

    def abandon_share(self) -> None:
        """Forgets what was seen since `begin_share`."""
        self._sum, self._rows = self._aside

    def end_share(self) -> None:
        """Adds what all processes of the default group have seen since to what was set aside."""
        shares: list[tuple[Tensor | None, int]] = [(None, 0)] * dist.get_world_size()
        dist.all_gather_object(shares, (self._sum, self._rows))
        self._sum, self._rows = self._aside
        for total, count in shares:
            if total is not None:
                self._sum = total if self._sum is None else self._sum + total
            self._rows += count

    @property
    def square_of_mean(self) -> Tensor:
        """`[I]` float64: squares of the means, averaged over the groups of a convolution."""
        assert self._sum is not None
        return (self._sum / self._rows).square().mean(0)

    def shift(self, error: Tensor, outputs: slice, out_features: int) -> Tensor:
        """`[rows]` float64: what an error `[rows, I]` of the rows `outputs` of a weight adds to them on average.

        Zeros if nothing was seen.
        """
        if self._sum is None:
            return error.new_zeros(len(error), dtype=torch.float64)
        mean = self._sum / self._rows
        group = torch.arange(outputs.start, outputs.stop) // (out_features // len(mean))
        return (error.double() * mean[group]).sum(1)
