"""Rounding to nearest whose errors even out on the mean input: of each row, few weights are rounded to their other neighbour.

Inputs that are never negative, as images and whatever follows a ReLU, all point more or less one way, their mean: errors along
it are most of what rounding adds to an output. Weights near the middle between two codes cost little to round the other way.
SQuant (Guo et al. 2022, arXiv:2202.07471) evens out the plain sums of errors; here they are weighted by the mean that
calibration saw.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.formats import IntFormat
from halfbyte.nn.packed_weight import WeightCodes


def evened_out(rounded: WeightCodes, weight: Tensor, weight_format: IntFormat, mean: Tensor) -> WeightCodes:
    """Codes whose errors add little to the mean output of each row.

    Args:
        rounded: Codes to the nearest, `[rows, I]`.
        weight: What they stand for, `[rows, I]`.
        weight_format: Their format, 2 bits at least.
        mean: Mean of the inputs of each row, `[rows, I]`.

    Returns:
        The codes, of which a row has changed as few and as cheap ones as its error takes: those first that cost least squared
        error for what they take off. None moves by more than one.
    """
    group_size = weight_format.group_size(weight.shape[1])
    scale = rounded.scale.float().repeat_interleave(group_size, 1)
    codes = rounded.codes.float()
    zero = 0 if rounded.zero_point is None else rounded.zero_point.repeat_interleave(group_size, 1)
    error = codes - zero - weight.float() / scale  # in codes
    effect = scale * mean.float()  # of one code, on the mean output
    total = (error * effect).sum(1, keepdim=True)
    step = -error.sign()
    moved = codes + step
    gain = -step * effect * total.sign()  # what a move takes off the error of the row
    allowed = (gain > 0) & (moved >= weight_format.qmin) & (moved <= weight_format.qmax) & (error.abs() <= 0.5)
    price = torch.where(allowed, (1 - 2 * error.abs()) * scale.square() / gain.abs().clamp(min=1e-30), torch.inf)
    order = price.argsort(dim=1, stable=True)
    gains = torch.where(allowed, gain, 0).gather(1, order)
    # A move that would overshoot by more than it takes off is left out, and whatever follows it.
    taken = (gains.cumsum(1) - gains / 2 <= total.abs()) & (gains > 0)
    taken = taken.long().cumprod(1).bool()
    chosen = torch.zeros_like(taken).scatter_(1, order, taken)
    return replace(rounded, codes=torch.where(chosen, moved, codes).to(rounded.codes.dtype))
