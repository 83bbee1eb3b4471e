"""AWQ: input channels that matter are scaled up before rounding, and ranges are clipped where that helps the output.

Lin et al. 2024 (arXiv:2306.00978).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.algorithms.rounding import MSE, RoundedLayer
from halfbyte.algorithms.scale_search import Candidate, Layer, by_channel, search_bytes, search_scales
from halfbyte.algorithms.transform import TransformContext, TransformRecord
from halfbyte.errors import QuantizationError
from halfbyte.folds import Fold
from halfbyte.formats import IntFormat, PackedFormat
from halfbyte.hessian import InputHessian
from halfbyte.nn.packed_weight import WeightCodes
from halfbyte.plan import Plan
from halfbyte.schemes import Scheme

_ROWS = 128  # clipped at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQ:
    """Transform that multiplies the columns of a weight by a power of the inputs' mean magnitude, and a rounding to go with it.

    What is multiplied into the columns is divided out of what produces the input: a norm, a linear layer before a gate or
    before attention's average. Places are found by running the model, and each is shown to leave the float model as it was.
    For every place, the powers r = i / grid are tried in both published forms, `mean|x|^r` and
    `mean|x|^r / mean(|w| / max|w|)^(1 - r)`, and no scaling at all; what is kept has the smallest error in the outputs of the
    layers that read it, on data, weights (and activations) quantized as the plan says.

    As the last algorithm it also chooses the integers: to nearest, in ranges that are searched for the smallest error in what
    each group adds to the output, beside the one that `MSE` finds. With a rounding after it, such as `GPTQ`, that does.

    Args:
        grid: Powers tried in each form.
        tokens: Tokens of each input that errors are measured on.
        clip_grid, max_shrink: Ranges tried are `1 - i * max_shrink / clip_grid` times min/max.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> report = hb.quantize_(model, hb.int4_weight_only(32), data=batches, algorithms=[hb.AWQ()], progress=False)
        >>> report.modules[1].rounding
        'AWQ'
    """

    grid: int = 20
    tokens: int = 512
    clip_grid: int = 10
    max_shrink: float = 0.5

    def __post_init__(self) -> None:
        for name in ("grid", "tokens", "clip_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if not 0.0 <= self.max_shrink < 1.0:
            raise ValueError(f"max_shrink={self.max_shrink} is not in [0, 1); use e.g. 0.5")

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    @property
    def needs_drift(self) -> bool:
        """Never: ranges are chosen for the weights as they are."""
        return False

    @property
    def by_groups(self) -> bool:
        """Always: a group of channels has inputs of its own."""
        return True

    def check(self, plan: Plan) -> None:
        """Raises if no layer gets integer weights."""
        if not any(row.scheme is not None and _integer_weight(row.scheme) for row in plan.targets):
            raise QuantizationError(
                "AWQ makes weights easier to round to integers, and none are: use e.g. hb.int4_weight_only()"
            )

    def calibration_bytes(self, plan: Plan) -> int:
        """Samples of inputs, and work on one layer."""
        return search_bytes(plan, self.tokens)

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        """Scales every place that feeds a layer with integer weights."""
        return search_scales(context, "AWQ", _integer_weight, self._candidates, self.tokens)

    def _candidates(self, fold: Fold, layers: Sequence[Layer]) -> list[Candidate]:
        layers = [layer for layer in layers if layer.scheme is not None]
        means = [by_channel(layer.inputs.mean_magnitude, layer.consumer, fold.channels, "mean") for layer in layers]
        sizes = [by_channel(_relative_size(layer), layer.consumer, fold.channels, "mean") for layer in layers]
        activation, weight = torch.stack(means).mean(dim=0), torch.stack(sizes).mean(dim=0)
        candidates = [Candidate(torch.ones(fold.channels), "none")]
        for step in range(self.grid):
            power = step / self.grid
            if step:
                candidates.append(Candidate(_centred(activation**power), f"|x|^{power:g}"))
            both = activation**power / (weight ** (1 - power) + 1e-4)
            candidates.append(Candidate(_centred(both), f"|x|^{power:g} / |w|^{1 - power:g}"))
        return candidates

    def round(self, weight: Tensor, weight_format: PackedFormat, importance: Tensor | None) -> WeightCodes:
        """Rounds rows of a table, which has no inputs."""
        return MSE().round(weight, weight_format, importance)

    def round_layer(self, name: str, weight: Tensor, weight_format: PackedFormat, inputs: InputHessian) -> RoundedLayer:
        """Rounds a whole weight, each group in the range with the smallest error in what it adds to the output."""
        hessian = inputs.matrix()
        if not isinstance(weight_format, IntFormat) or weight_format.binary:
            return RoundedLayer(MSE().round(weight, weight_format, hessian.diagonal().float()))
        size = weight_format.group_size(weight.shape[1])
        blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)]).float()
        parts = [self._clip(rows, weight_format, blocks) for rows in torch.split(weight.float(), _ROWS)]
        zero_points = [part.zero_point for part in parts if part.zero_point is not None]
        codes = WeightCodes(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zero_points) if zero_points else None,
        )
        return RoundedLayer(codes)

    def _clip(self, weight: Tensor, weight_format: IntFormat, blocks: Tensor) -> WeightCodes:
        """Some rows of a weight; `blocks` `[G, group_size, group_size]` are those of the Hessian on its diagonal."""
        groups, size, _ = blocks.shape
        smallest = torch.full((len(weight), groups), torch.inf)
        scale, zero_point = _qparams(weight, weight_format, size)
        for new_scale, new_zero in self._ranges(weight, weight_format, blocks):
            codes = _quantize(weight, new_scale, new_zero, weight_format, size)
            error = (ops.dequantize(codes, new_scale.float(), new_zero, group_size=size) - weight).view(
                -1, groups, size
            )
            loss = torch.einsum("ogi,ogi->og", torch.einsum("ogi,gij->ogj", error, blocks), error)
            better = loss < smallest
            smallest = torch.where(better, loss, smallest)
            scale, zero_point = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero_point)
        codes = _quantize(weight, scale, zero_point, weight_format, size)
        return WeightCodes(codes, scale, None if weight_format.symmetric else zero_point.to(torch.uint8))

    def _ranges(self, weight: Tensor, weight_format: IntFormat, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and zero points to try for every group."""
        size = blocks.shape[1]
        low, high = (t.repeat_interleave(size, dim=1) for t in ops.observe_minmax(weight, group_size=size))
        for step in range(self.clip_grid):
            shrink = 1 - step * self.max_shrink / self.clip_grid
            yield _qparams(torch.maximum(torch.minimum(weight, high * shrink), low * shrink), weight_format, size)
        importance = blocks.diagonal(dim1=1, dim2=2).reshape(-1)
        yield _qparams(weight, weight_format, size, importance.contiguous(), MSE())


def _integer_weight(scheme: Scheme) -> bool:
    return isinstance(scheme.weight, IntFormat)


def _relative_size(layer: Layer) -> Tensor:
    """`[I]`: mean magnitude of each column, every weight relative to the largest of its group."""
    assert layer.scheme is not None
    magnitude = layer.weight.abs()
    if isinstance(layer.scheme.weight, IntFormat):
        grouped = magnitude.view(len(magnitude), -1, layer.scheme.weight.group_size(magnitude.shape[1]))
        magnitude = (grouped / grouped.amax(dim=2, keepdim=True).clamp(min=1e-30)).view_as(magnitude)
    return magnitude.mean(dim=0)


def _centred(scale: Tensor) -> Tensor:
    """Scales around 1, so that neither side leaves the range of its dtype."""
    scale = scale.clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def _qparams(
    weight: Tensor, weight_format: IntFormat, size: int, importance: Tensor | None = None, search: MSE | None = None
) -> tuple[Tensor, Tensor]:
    scale, zero_point, _ = ops.search_qparams(
        weight.contiguous(),
        importance,
        bits=weight_format.bits,
        symmetric=weight_format.symmetric,
        narrow_range=weight_format.narrow_range,
        group_size=size,
        grid=1 if search is None else search.grid,
        max_shrink=0.0 if search is None else search.max_shrink,
        scale_dtype=weight_format.scale_dtype,
    )
    return scale, zero_point


def _quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, weight_format: IntFormat, size: int) -> Tensor:
    return ops.quantize(
        weight, scale.float(), zero_point, qmin=weight_format.qmin, qmax=weight_format.qmax, group_size=size
    )
