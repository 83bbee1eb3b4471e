"""SmoothQuant: outliers of a layer's inputs move into its weights, so that 8-bit activations can hold the rest.

Xiao et al. 2023 (arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.algorithms.scale_search import Candidate, Layer, by_channel, search_bytes, search_scales
from halfbyte.algorithms.transform import TransformContext, TransformRecord
from halfbyte.errors import QuantizationError
from halfbyte.folds import Fold
from halfbyte.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant:
    """Transform that divides channel j of an input by `max|x_j|^alpha / max|w_j|^(1 - alpha)` and multiplies weights by it.

    The division is folded into what produces the input: a norm, a linear layer before a gate or before attention's average.
    Places are found by running the model, and each is shown to leave the float model as it was.

    Args:
        alpha: How much of an outlier moves into the weights, 0 to 1; "search" tries eleven values for each place, and
            leaving it alone, on the error of the layers that read it.
        tokens: Tokens of each input that the search measures errors on.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> smooth = hb.algorithms.SmoothQuant(alpha=0.5)
        >>> report = hb.quantize_(model, hb.int8_dynamic(), data=batches, algorithms=[smooth], progress=False)
        >>> [record.producer for record in report.transforms if record.change is not None]
        ['0', '1']
    """

    alpha: float | str = "search"
    tokens: int = 512

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (self.alpha == "search" or (number and 0.0 <= float(self.alpha) <= 1.0)):
            raise ValueError(f"alpha={self.alpha!r} is not in [0, 1]; use e.g. 0.5, or 'search'")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} is not positive; use e.g. 512")

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def check(self, plan: Plan) -> None:
        """Raises if no layer gets integer activations."""
        if not any(row.scheme is not None and row.scheme.activation is not None for row in plan.targets):
            raise QuantizationError(
                "SmoothQuant makes activations easier to quantize, and none are: use hb.int8_dynamic() or "
                "hb.int4_int8_dynamic(), or hb.AWQ() for weights"
            )

    def calibration_bytes(self, plan: Plan) -> int:
        """Samples of inputs, and work on one layer."""
        return search_bytes(plan, self.tokens)

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        """Scales every place that feeds a layer with integer activations."""
        return search_scales(
            context, "SmoothQuant", lambda scheme: scheme.activation is not None, self._candidates, self.tokens
        )

    def _candidates(self, fold: Fold, layers: Sequence[Layer]) -> list[Candidate]:
        activation, weight = torch.zeros(fold.channels), torch.zeros(fold.channels)
        for layer in layers:
            channels = fold.channels
            activation = torch.maximum(activation, by_channel(layer.inputs.absmax, layer.consumer, channels, "amax"))
            columns = layer.weight.abs().amax(dim=0)
            weight = torch.maximum(weight, by_channel(columns, layer.consumer, channels, "amax"))
        if self.alpha != "search":
            return [_candidate(activation, weight, float(self.alpha))]
        alone = Candidate(torch.ones(fold.channels), "none")
        return [alone, *(_candidate(activation, weight, step / 10) for step in range(11))]


def _candidate(activation: Tensor, weight: Tensor, alpha: float) -> Candidate:
    scale = activation.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)
    return Candidate(scale.clamp(min=1e-5), f"alpha={alpha:g}")
