"""Batch normalization that the layer before it folds into its weights.

As in Krishnamoorthi 2018 (arXiv:1806.08342): the folded weight `w * gain / std` is what is quantized, with the running
statistics. While batch statistics are used, the layer's output is divided by that factor again (here: its weight, which costs
nothing a pixel) and normalized as always. Once frozen, the layer computes what it will compute when converted.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from halfbyte.qat.quantizer_base import recomputing
from halfbyte.qat.switches import Switches


class QATBatchNorm(Switches):
    """Base of `QATBatchNorm1d` and its kin: a batch normalization that gives back its input once it is folded.

    It is folded in evaluation mode and when frozen (`hb.qat.freeze_batchnorm`): the layer before it has taken it in then.
    """

    @classmethod
    def of(cls, norm: _BatchNorm) -> QATBatchNorm:
        """One that takes the place of `norm` and holds its parameters and buffers."""
        module = cast(QATBatchNorm, taken_over(_TYPES[type(norm)], norm))
        module.add_switches(frozen=False)
        return module

    @property
    def folded(self) -> bool:
        """Whether the layer before it does its work."""
        return self.on("frozen") or not self.training

    def forward(self, x: Tensor) -> Tensor:
        """The input itself where it is folded, else normalized with the statistics of the batch."""
        if self.folded:
            return x
        if recomputing():  # the statistics of this batch count already
            norm = cast(_BatchNorm, self)
            mean, var = (None if t is None else t.clone() for t in (norm.running_mean, norm.running_var))
            return F.batch_norm(x, mean, var, norm.weight, norm.bias, training=True, eps=norm.eps)
        normalized: Tensor = super().forward(x)
        return normalized

    def fold(self) -> tuple[Tensor, Tensor]:
        """`factor` and `shift` `[O]`: the normalization is `y * factor + shift`, with the running statistics."""
        norm = cast(_BatchNorm, self)
        assert norm.running_mean is not None and norm.running_var is not None
        factor = (norm.running_var + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        shift = -norm.running_mean * factor
        return factor, shift if norm.bias is None else shift + norm.bias


class QATBatchNorm1d(QATBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d`; see `QATBatchNorm`."""


class QATBatchNorm2d(QATBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d`; see `QATBatchNorm`."""


class QATBatchNorm3d(QATBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d`; see `QATBatchNorm`."""


_TYPES: dict[type[nn.Module], type[QATBatchNorm]] = {
    nn.BatchNorm1d: QATBatchNorm1d,
    nn.BatchNorm2d: QATBatchNorm2d,
    nn.BatchNorm3d: QATBatchNorm3d,
}


def taken_over(cls: type[nn.Module], old: nn.Module) -> nn.Module:
    """A module of class `cls` with everything that `old` holds: parameters and buffers themselves, settings, hooks."""
    new: nn.Module = cls.__new__(cls)
    new.__dict__ = dict(old.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kind] = dict(old.__dict__[kind])
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
    return new


def safe_divisor(factor: Tensor) -> Tensor:
    """The factor, 1 where it is 0: a channel that the normalization has switched off trains with its own weight."""
    return torch.where(factor == 0, torch.ones_like(factor), factor)
