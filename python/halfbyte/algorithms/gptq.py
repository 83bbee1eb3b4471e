"""GPTQ: columns are rounded one after another, and each makes up for the errors of those before it.

Frantar et al. 2023 (arXiv:2210.17323), in the form of Chee et al. 2023 (arXiv:2307.13304, LDLQ), which gives the same
numbers from one Cholesky factorisation and no inverse. Before it, the target is corrected for what the quantized layers before
this one changed; after it, coordinate descent lowers the error further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.algorithms.rounding import MSE, RoundedLayer
from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback
from halfbyte.formats import CodebookFormat, IntFormat, PackedFormat, PerTensor
from halfbyte.hessian import InputHessian, retarget
from halfbyte.nn.packed_weight import WeightCodes


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ:
    """Rounding that minimises the error of the layer's output on calibration data.

    `quantize_` works through the model block by block, and within a block layer by layer, so that every layer sees inputs
    that the already quantized layers before it produce. Tables, whose rows are read alone, are rounded by `MSE`.

    Args:
        damping: Added to the diagonal of the Hessian, relative to its mean. Doubled until it can be factored; the report
            says where that happened.
        act_order: Round columns with large inputs first, when later ones can still make up for them. The stored layout does
            not depend on it. With dynamic scales, groups and the columns within each are ordered.
        group_scales: "static" chooses all scales on the original weights, "dynamic" each group's when its turn comes, on the
            weights as the errors so far have shifted them.
        error_feedback: How far a layer aims at what the float layer makes of the float model's inputs, while its own come from
            quantized layers: 0 not at all (textbook GPTQ), 1 at the least-squares solution, which follows the calibration data
            most closely. Every block then runs twice, in floating point as well. Only `quantize_` knows both inputs: with
            `prepare_` there is nothing to correct.
        polish: Sweeps of coordinate descent over codes, scales and zero points, at most (`hb.ops.gptq_polish`); none accepts
            anything that makes the layer's error larger. 0 is textbook GPTQ. Codebooks are not polished.
        grid, max_shrink: Range search of the scales, as in `MSE`; `grid=1` takes min to max.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> report = hb.quantize_(model, hb.int4_weight_only(32), data=batches, algorithms=[hb.GPTQ()], progress=False)
        >>> report.modules[0].rounding
        'GPTQ'
    """

    damping: float = 0.01
    act_order: bool = True
    group_scales: Literal["static", "dynamic"] = "dynamic"
    error_feedback: float = 0.5
    polish: int = 4
    grid: int = 64
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping < 1e3:
            raise ValueError(f"damping={self.damping} is not in [0, 1000); use e.g. 0.01")
        if self.group_scales not in ("static", "dynamic"):
            raise ValueError(f"group_scales={self.group_scales!r} is unknown; use 'static' or 'dynamic'")
        if not 0.0 <= self.error_feedback <= 1.0:
            raise ValueError(f"error_feedback={self.error_feedback} is not in [0, 1]; use e.g. 0.5, or 0 for none")
        if isinstance(self.polish, bool) or not isinstance(self.polish, int) or self.polish < 0:
            raise ValueError(f"polish={self.polish!r} is not a number of sweeps; use e.g. 4, or 0 for none")
        MSE(grid=self.grid, max_shrink=self.max_shrink)

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    @property
    def needs_drift(self) -> bool:
        """With error feedback."""
        return self.error_feedback > 0

    @property
    def by_groups(self) -> bool:
        """Always: a group of channels has inputs of its own."""
        return True

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Rounds rows of a table, which has no Hessian."""
        return MSE(grid=self.grid, max_shrink=self.max_shrink).round(weight, weight_format, importance)

    def round_layer(self, name: str, weight: Tensor, weight_format: PackedFormat, inputs: InputHessian) -> RoundedLayer:
        """Rounds a whole weight.

        Raises:
            QuantizationError: fewer tokens than the layer has inputs, so that its Hessian cannot have full rank.
        """
        in_features = weight.shape[1]
        if weight_format.granularity == PerTensor():
            raise QuantizationError(f"{name}: GPTQ has no weights with one scale for all outputs; use PerAxis(0)")
        hessian = inputs.matrix()
        if inputs.tokens < in_features:
            raise QuantizationError(
                f"{name}: {inputs.tokens} tokens of calibration data reached it, fewer than its {in_features} inputs; give at "
                f"least {in_features - inputs.tokens} more"
            )
        # Damped like the Hessian itself: columns that were never seen keep a say in the range.
        diagonal = hessian.diagonal()
        importance = (diagonal + self.damping * diagonal.mean()).float()
        order = self._order(importance, weight_format.group_size(in_features))
        factor, damping = inputs.factor(hessian, self.damping, order)
        drift = inputs.drift() if self.needs_drift else None
        if drift is not None:
            weight = retarget(weight, factor, order, drift, self.error_feedback)
        codes, scale, zero_point = self._feed_back(weight, weight_format, factor, order, importance)
        if self.polish and isinstance(weight_format, IntFormat):
            hessian.diagonal().add_(damping * hessian.diagonal().mean())
            codes, scale, zero_point = ops.gptq_polish(
                weight,
                hessian.float(),
                codes,
                scale,
                zero_point,
                sweeps=self.polish,
                **_format(weight_format, in_features),
            )
        fallbacks: tuple[Fallback, ...] = ()
        if damping != self.damping:
            message = f"its Hessian could not be factored with damping={self.damping:g}: {damping:g} is used"
            fallbacks = (Fallback(name, "damping", message),)
        zero = None if weight_format.symmetric else zero_point.to(torch.uint8)
        table = weight_format.table() if isinstance(weight_format, CodebookFormat) else None
        return RoundedLayer(WeightCodes(codes, scale, zero, table), fallbacks)

    def _feed_back(
        self, weight: Tensor, weight_format: PackedFormat, factor: Tensor, order: Tensor, importance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """GPTQ itself: codes, scales and zero points."""
        options = _format(weight_format, weight.shape[1])
        search: _Search = {
            "grid": self.grid,
            "max_shrink": self.max_shrink,
            "scale_dtype": weight_format.scale_dtype,
            "codebook": weight_format.entries() if isinstance(weight_format, CodebookFormat) else None,
        }
        scale = zero_point = None
        if self.group_scales == "static":
            scale, zero_point, _ = ops.search_qparams(weight, importance, **options, **search)
        return ops.gptq_round(
            weight,
            factor,
            order=order,
            scale=scale,
            zero_point=zero_point,
            # What an error of a column adds to the loss once later ones have made up for it.
            importance=torch.empty_like(importance).scatter_(0, order, factor.diagonal().square()),
            **options,
            **search,
        )[:3]

    def _order(self, importance: Tensor, group_size: int) -> Tensor:
        if not self.act_order:
            return torch.arange(len(importance))
        if self.group_scales == "static":
            return torch.argsort(importance, descending=True, stable=True)
        grouped = importance.view(-1, group_size)
        within = torch.argsort(grouped, dim=1, descending=True, stable=True)
        groups = torch.argsort(grouped.mean(dim=1), descending=True, stable=True)
        return (within + torch.arange(len(grouped))[:, None] * group_size)[groups].reshape(-1)


class _Format(TypedDict):
    bits: int
    symmetric: bool
    narrow_range: bool
    group_size: int


class _Search(TypedDict):
    grid: int
    max_shrink: float
    scale_dtype: torch.dtype
    codebook: Tensor | None


def _format(weight_format: PackedFormat, in_features: int) -> _Format:
    return {
        "bits": weight_format.bits,
        "symmetric": weight_format.symmetric,
        "narrow_range": isinstance(weight_format, IntFormat) and weight_format.narrow_range,
        "group_size": weight_format.group_size(in_features),
    }
