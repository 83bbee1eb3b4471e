"""Bias correction: what rounding a weight adds to its outputs on average is taken off the bias.

Nagel et al. 2019 (arXiv:1906.04721), with the mean inputs measured on calibration data: `E[Ŵ x] - E[W x] = (Ŵ - W) E[x]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfbyte.calibration import tokens_of
from halfbyte.convolution import ConvGeometry, ConvModule

_ELEMENTS = 1 << 16  # of an input that are looked at, about
_LEAST_LINES = 4  # of each image
_ALL_OF, _LATER = 16, 4  # the first batches, and every how many of the others


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

    Constant memory. Taps of a convolution that lie outside the input count as the zeros that they read. Of large inputs some
    lines are looked at, others in every batch, which are taken to stand for those that a tap reads; of many batches, all of
    the first and one in four of the others.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # [groups, I] float64
        self._rows = self._batches = 0
        self._taps: _Taps | None = None

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The hook: adds the first positional argument."""
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        self._batches += 1
        if self._batches > _ALL_OF and self._batches % _LATER:
            return
        x = args[0].detach()
        if isinstance(module, ConvModule):
            geometry = ConvGeometry.of(module)
            total, count = self._tap_sums(x.unsqueeze(0) if x.dim() == geometry.dims + 1 else x, geometry)
        else:
            rows = tokens_of(x)
            total, count = rows.sum(0, keepdim=True, dtype=torch.float64), rows.shape[0]
        self._sum = total if self._sum is None else self._sum + total
        self._rows += count

    def _tap_sums(self, x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, int]:
        """What the taps of a convolution read: sums `[groups, I]`, and over how many rows."""
        if geometry.transposed or geometry.padding_mode != "zeros":
            rows = geometry.rows(x.sum(0, keepdim=True, dtype=torch.float64))  # unfolding is linear
            return rows.sum(1), rows.shape[1] * x.shape[0]
        lines = x.shape[2] // _LEAST_LINES if geometry.dims > 1 else 1
        step = max(1, min(x.numel() // _ELEMENTS, lines))
        if self._taps is None or self._taps.key != (tuple(x.shape[2:]), step):
            self._taps = _Taps(geometry, x.shape[2:], step)
        return self._taps.sums(x, geometry, self._batches), self._taps.rows * x.shape[0]

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

    def of_rows(self, begin: int, count: int, out_features: int) -> Tensor | None:
        """`[count, I]` float64: mean inputs of the rows from `begin` on of a weight; None if nothing was seen."""
        if self._sum is None:
            return None
        mean = self._sum / self._rows
        return mean[torch.arange(begin, begin + count) // (out_features // len(mean))]

    def shift(self, error: Tensor, begin: int, out_features: int) -> Tensor:
        """`[rows]` float64: what an error `[rows, I]` of the rows from `begin` on of a weight adds to them on average.

        Zeros if nothing was seen.
        """
        mean = self.of_rows(begin, len(error), out_features)
        return error.new_zeros(len(error), dtype=torch.float64) if mean is None else (error.double() * mean).sum(1)


class _Taps:
    """Which inputs the taps of a convolution read, counted along one dimension after the other.

    Args:
        geometry: Of a convolution that is not transposed and pads with zeros.
        size: Spatial sizes of the input.
        step: Every how many lines are looked at.
    """

    def __init__(self, geometry: ConvGeometry, size: Sequence[int], step: int) -> None:
        self.key = (tuple(size), step)
        outputs = geometry.output_size(size)
        self.rows = prod(outputs)  # of one image
        self._read: list[Tensor] = []  # [taps, inputs]: 1 where an output reads an input with this tap
        for dim, (taps, count) in enumerate(zip(geometry.kernel_size, outputs, strict=True)):
            begin = torch.arange(taps) * geometry.dilation[dim] - geometry.padding_before[dim]
            position = begin[:, None] + torch.arange(count) * geometry.stride[dim]
            inside = (position >= 0) & (position < size[dim])
            read = torch.zeros(taps, size[dim]).scatter_add_(1, position.clamp(0, size[dim] - 1), inside.float())
            self._read.append(read if dim or step == 1 else read.sum(1, keepdim=True))

    def sums(self, x: Tensor, geometry: ConvGeometry, batch: int) -> Tensor:
        """`[groups, I]` float64: what each tap reads of `x` `[N, C, ...]`, over all outputs."""
        step = self.key[1]
        total = x[:, :, batch % step :: step].sum(0, dtype=torch.float32)
        if step > 1:
            total = total.mean(1, keepdim=True)
        for read in self._read:  # the kernel's dimensions gather behind those that are left
            total = torch.tensordot(total, read, dims=([1], [1]))
        return total.reshape(geometry.groups, x.shape[1] // geometry.groups, -1).transpose(1, 2).flatten(1).double()
