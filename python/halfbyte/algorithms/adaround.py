"""AdaRound: each weight is rounded up or down so that the layer's output changes least.

Nagel et al. 2020 (arXiv:2004.10568), reconstruction of a layer. Its loss over all calibration data is a quadratic form in the
rounding, with the Hessian of the layer's inputs: `sum ||W x - Ŵ x||^2 = tr((W - Ŵ) H (W - Ŵ)^T)`. So no data is kept, and the
memory does not depend on how much there was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.algorithms.rounding import MSE, RoundedLayer
from halfbyte.errors import QuantizationError
from halfbyte.formats import IntFormat, PackedFormat
from halfbyte.hessian import InputHessian
from halfbyte.nn.packed_weight import WeightCodes

_ZETA, _GAMMA = 1.1, -0.1  # ends of the stretched sigmoid
_BETA = (20.0, 2.0)  # exponent of the regularizer, from start to end
_SWEEPS = 3  # over the columns, once the rounding is chosen
_WARMUP = 0.2  # part of the steps before the regularizer counts


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaRound:
    """Rounding up or down chosen by gradient descent on the error of the layer's output, then code by code.

    Scales are those of `MSE` with calibration data. `quantize_` works through the model in order, so that every layer sees
    inputs that the already quantized layers before it produce. A row keeps rounding to nearest where that is better.

    Args:
        steps: Steps of Adam for each layer.
        learning_rate: Of the rounding variables.
        regularization: Weight of the term that drives them to 0 or 1.
        grid, max_shrink: Range search of the scales, as in `MSE`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> adaround = hb.algorithms.AdaRound(steps=100)
        >>> report = hb.quantize_(model, hb.int4_int8_static(), data=batches, algorithms=[adaround], progress=False)
        >>> report.modules[0].rounding
        'AdaRound'
    """

    steps: int = 500
    learning_rate: float = 0.03
    regularization: float = 1.0
    grid: int = 64
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is not positive; use e.g. 500")
        for name in ("learning_rate", "regularization"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use e.g. 0.01")
        MSE(grid=self.grid, max_shrink=self.max_shrink)

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    @property
    def needs_drift(self) -> bool:
        """Never."""
        return False

    @property
    def by_groups(self) -> bool:
        """Never: gradient descent over each group apart would take too long."""
        return False

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Rounds rows of a table, which has no Hessian."""
        return MSE(grid=self.grid, max_shrink=self.max_shrink).round(weight, weight_format, importance)

    def round_layer(self, name: str, weight: Tensor, weight_format: PackedFormat, inputs: InputHessian) -> RoundedLayer:
        """Rounds a whole weight.

        Raises:
            QuantizationError: a codebook, whose values are not evenly spaced.
        """
        if not isinstance(weight_format, IntFormat):
            raise QuantizationError(f"{name}: AdaRound rounds to integers, not to {weight_format}; use hb.GPTQ()")
        hessian = inputs.matrix()
        importance = hessian.diagonal().float()
        nearest = self.round(weight, weight_format, importance)
        if weight_format.binary:
            return RoundedLayer(nearest)
        group_size = weight_format.group_size(weight.shape[1])
        scale = nearest.scale.float().repeat_interleave(group_size, 1)
        zero = torch.zeros(()) if nearest.zero_point is None else nearest.zero_point.repeat_interleave(group_size, 1)
        target = weight.float() / scale + zero
        hessian = (hessian / hessian.diagonal().mean().clamp(min=1e-30)).float()
        with torch.enable_grad():
            up = _choose(target, scale / scale.square().mean(1, keepdim=True).sqrt(), hessian, self)
        codes = torch.clamp(target.floor() + up, weight_format.qmin, weight_format.qmax)
        _descend(codes, target, scale, hessian, weight_format)
        better = _loss(codes - target, scale, hessian) < _loss(nearest.codes - target, scale, hessian)
        codes = torch.where(better[:, None], codes, nearest.codes.float()).to(nearest.codes.dtype)
        return RoundedLayer(WeightCodes(codes, nearest.scale, nearest.zero_point))


def _choose(target: Tensor, scale: Tensor, hessian: Tensor, options: AdaRound) -> Tensor:
    """1 where a weight is rounded up, else 0. `target` are codes with their fraction, `scale` what one is worth."""
    fraction = target - target.floor()
    start = torch.logit(((fraction - _GAMMA) / (_ZETA - _GAMMA)).clamp(1e-4, 1 - 1e-4))
    variables = start.clone().requires_grad_()
    adam = torch.optim.Adam([variables], lr=options.learning_rate)
    warm = int(options.steps * _WARMUP)
    for step in range(options.steps):
        up = (variables.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        loss = _loss(up - fraction, scale, hessian).sum()
        if step >= warm:
            part = (step - warm) / max(options.steps - warm, 1)
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - part)
            loss = loss + options.regularization * (1 - (2 * up - 1).abs().pow(beta)).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return (variables.detach() >= 0).float()


def _descend(codes: Tensor, target: Tensor, scale: Tensor, hessian: Tensor, weight_format: IntFormat) -> None:
    """Moves one code of each row at a time to its other neighbour of the weight, while that lowers the loss."""
    gradient = ((codes - target) * scale) @ hessian  # of half the loss, by what a row's errors are worth
    for _ in range(_SWEEPS):
        for column in range(codes.shape[1]):
            code, below = codes[:, column], target[:, column].floor()
            other = torch.clamp(2 * below + 1 - code, weight_format.qmin, weight_format.qmax)
            step = (other - code) * scale[:, column]
            helps = (2 * step * gradient[:, column] + step.square() * hessian[column, column] < 0).float()
            codes[:, column] += helps * (other - code)
            gradient += (helps * step)[:, None] * hessian[column]


def _loss(error: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """`[O]`: what errors in codes do to each output."""
    weighted = error * scale
    return ((weighted @ hessian) * weighted).sum(1)
