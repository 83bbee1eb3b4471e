"""What SmoothQuant and AWQ share: samples of layers' inputs, and the error that a quantized layer makes on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.algorithms.rounding import RTN
from halfbyte.algorithms.transform import TransformContext, TransformRecord
from halfbyte.calibration import InputStatistics, without_padding
from halfbyte.errors import QuantizationError
from halfbyte.folds import Consumer, Fold
from halfbyte.formats import IntFormat, PerToken
from halfbyte.plan import Plan
from halfbyte.processes import Processes, together
from halfbyte.progress import track
from halfbyte.schemes import Scheme

_FEWEST_TOKENS = 32
_SMALLEST = 1e-8  # of the largest: what a channel that is always zero counts as


class InputSample(InputStatistics):
    """Largest and mean magnitude of each input over all tokens, and some tokens themselves.

    Args:
        name: Qualified name of the layer.
        rows_a_batch: Tokens to keep of each batch, spaced evenly.
    """

    def __init__(self, name: str, rows_a_batch: int) -> None:
        super().__init__(name)
        self._rows_a_batch = rows_a_batch
        self._kept: list[Tensor] = []
        self._sum: Tensor | None = None
        self._absmax: Tensor | None = None

    def _add(self, rows: Tensor) -> None:
        super()._add(rows)
        if not len(rows):
            return
        magnitude = rows.abs().float()
        total, largest = magnitude.sum(dim=0, dtype=torch.float64), magnitude.amax(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self._absmax = largest if self._absmax is None else torch.maximum(self._absmax, largest)
        at = torch.linspace(0, len(rows) - 1, min(self._rows_a_batch, len(rows))).round().long()
        self._kept.append(rows[at].float())

    def add_up(self, processes: Processes) -> None:
        """Adds what all processes have seen."""
        shares = processes.gather((self._sum, self._absmax, self._kept, self.tokens, self.batches))
        sums = [total for total, *_ in shares if total is not None]
        maxima = [largest for _, largest, *_ in shares if largest is not None]
        self._sum = torch.stack(sums).sum(dim=0) if sums else None
        self._absmax = torch.stack(maxima).amax(dim=0) if maxima else None
        self._kept = [rows for share in shares for rows in share[2]]
        self.tokens, self.batches = sum(share[3] for share in shares), sum(share[4] for share in shares)

    def check(self) -> None:
        """Raises unless the layer ran, on enough tokens."""
        if self._sum is None:
            raise self._never_ran()
        if self.tokens < _FEWEST_TOKENS:
            raise QuantizationError(
                f"{self._name}: {self.tokens} tokens of calibration data reached it; give at least "
                f"{_FEWEST_TOKENS - self.tokens} more"
            )

    @property
    def rows(self) -> Tensor:
        """`[n, I]` float32."""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0]

    @property
    def absmax(self) -> Tensor:
        """`[I]` float32."""
        assert self._absmax is not None
        return self._absmax

    @property
    def mean_magnitude(self) -> Tensor:
        """`[I]` float32."""
        assert self._sum is not None
        return (self._sum / self.tokens).float()

    def divide(self, scale: Tensor) -> None:
        """What would have been seen had the inputs been divided by `scale` `[I]`."""
        assert self._sum is not None
        self._kept = [self.rows / scale]
        self._sum, self._absmax = self._sum / scale.double(), self.absmax / scale


@dataclass(frozen=True, slots=True)
class Layer:
    """A consumer of a fold, as the search sees it."""

    consumer: Consumer
    weight: Tensor
    inputs: InputSample
    scheme: Scheme | None
    energy: float

    def error(self, scale: Tensor) -> float:
        """`‖Q(x / s) Q(W s)^T - x W^T‖² / ‖x W^T‖²` on the sample, both quantized as the scheme says."""
        if self.scheme is None or not isinstance(self.scheme.weight, IntFormat):
            return 0.0
        column = scale[self.consumer.channel_of]
        weight, x = self.weight * column, self.inputs.rows / column
        group_size = self.scheme.weight.group_size(weight.shape[1])
        rounded = RTN().round(weight, self.scheme.weight, None).dequantize(group_size)
        exact = self.inputs.rows @ self.weight.t()
        activation = self.scheme.activation
        given = x if activation is None else _quantized_inputs(x, activation)
        return (given @ rounded.t() - exact).square().sum().item() / max(self.energy, 1e-30)


def _quantized_inputs(x: Tensor, activation: IntFormat) -> Tensor:
    """What dynamic activations turn `x` `[n, I]` into, or static ones whose range is that of the sample."""
    if isinstance(activation.granularity, PerToken):
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    else:
        low, high = x.amin().expand(len(x), 1), x.amax().expand(len(x), 1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    span = torch.maximum(high, -low) / activation.qmax
    if not activation.symmetric:
        span = (high - low) / (activation.qmax - activation.qmin)
    scale = span.clamp(min=torch.finfo(torch.float32).tiny).contiguous()
    zero = torch.zeros_like(scale) if activation.symmetric else (activation.qmin - low / scale).round()
    zero = zero.clamp(activation.qmin, activation.qmax).to(torch.int32)
    return ops.fake_quantize(x, scale, zero, qmin=activation.qmin, qmax=activation.qmax, group_size=x.shape[1])


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scale `[channels]` to try, and its description."""

    scale: Tensor
    detail: str


def search_scales(
    context: TransformContext,
    transform: str,
    wanted: Callable[[Scheme], bool],
    candidates: Callable[[Fold, Sequence[Layer]], Sequence[Candidate]],
    tokens: int,
) -> list[TransformRecord]:
    """Applies to every fold the candidate with the smallest error, if any is better than leaving it alone.

    Args:
        context: The model, its plan, and data.
        transform: Class name, for the records.
        wanted: Whether a layer with this scheme is to gain; folds without such a consumer are left alone.
        candidates: Gives the scales to try; a single one is taken without a trial.
        tokens: Tokens of each input to measure errors on.

    Raises:
        QuantizationError: NaN among a layer's inputs, too few tokens, or a layer that never ran.
    """
    schemes = {row.name: row.scheme for row in context.plan.targets}
    folds, failed = context.folds()
    records = [TransformRecord(transform=transform, producer=n.producer, reason=n.reason) for n in failed]
    chosen = [
        fold
        for fold in folds
        if any((scheme := schemes.get(c.name)) is not None and wanted(scheme) for c in fold.consumers)
    ]
    samples = _collect(context, chosen, tokens)
    if not chosen:
        reason = f"no scale can move into any of its layers (of {len(failed)} places tried, none)"
        records.append(TransformRecord(transform=transform, producer="model", reason=reason, failed=True))
    for fold in track(chosen, f"searching scales ({transform})", enabled=context.progress):
        layers = [_layer(context.model, consumer, samples, schemes.get(consumer.name)) for consumer in fold.consumers]
        tried = candidates(fold, layers)
        exact = _exact_scales(context.model, fold)
        scales = [exact(candidate.scale) for candidate in tried]
        best = 0
        if len(tried) > 1:
            errors = [sum(layer.error(scale) for layer in layers) for scale in scales]
            best = min(range(len(tried)), key=errors.__getitem__)
        names = tuple(consumer.name for consumer in fold.consumers)
        record = {"transform": transform, "producer": fold.producer, "consumers": names, "detail": tried[best].detail}
        if bool((scales[best] == 1).all()):
            records.append(TransformRecord(**record, reason="no scale is better than none"))  # type: ignore[arg-type]
            continue
        change, reason = context.example.prove(fold.apply(context.model, scales[best], context.edits))
        records.append(TransformRecord(**record, change=change, reason=reason, failed=bool(reason)))  # type: ignore[arg-type]
        if not reason:
            for source in {c.same_input_as for c in fold.consumers}:
                consumer = next(c for c in fold.consumers if c.same_input_as == source)
                samples[source].divide(scales[best][consumer.channel_of])
    return records


def search_bytes(plan: Plan, tokens: int) -> int:
    """Memory that `search_scales` takes: samples of all inputs, and three times the largest weight."""
    shapes = [row.shape for row in plan.targets if row.shape is not None]
    return 4 * tokens * sum(shape[1] for shape in shapes) + 12 * max(shape[0] * shape[1] for shape in shapes)


def _collect(context: TransformContext, folds: Sequence[Fold], tokens: int) -> dict[str, InputSample]:
    """One pass over the data: a sample of every distinct input."""
    processes = context.processes
    batches = len(context.batches) if processes is None else sum(processes.gather(len(context.batches)))
    rows_a_batch = -(-tokens // max(1, batches))
    samples = {c.same_input_as: InputSample(c.same_input_as, rows_a_batch) for fold in folds for c in fold.consumers}
    if not samples:
        return samples
    with ExitStack() as hooks:
        hooks.enter_context(together(processes))
        for name, sample in samples.items():
            hooks.callback(context.model.get_submodule(name).register_forward_pre_hook(sample).remove)
        for batch in track(context.batches, "sampling inputs", enabled=context.progress):
            with without_padding(batch):
                context.run(batch)
    for sample in samples.values():
        if processes is not None:
            sample.add_up(processes)
        sample.check()
    return samples


def _layer(model: nn.Module, consumer: Consumer, samples: dict[str, InputSample], scheme: Scheme | None) -> Layer:
    weight = model.get_submodule(consumer.name).weight
    assert isinstance(weight, Tensor)
    sample = samples[consumer.same_input_as]
    energy = (sample.rows @ weight.detach().float().t()).square().sum().item()
    return Layer(consumer, weight.detach().float(), sample, scheme, energy)


def _exact_scales(model: nn.Module, fold: Fold) -> Callable[[Tensor], Tensor]:
    """16-bit weights take powers of two, which lose nothing."""
    parameters = [
        p for n in (fold.producer, *(c.name for c in fold.consumers)) for p in model.get_submodule(n).parameters()
    ]
    if any(p.dtype != torch.float32 for p in parameters):
        return lambda scale: scale.log2().round().exp2()
    return lambda scale: scale


def by_channel(values: Tensor, consumer: Consumer, channels: int, reduce: str) -> Tensor:
    """`[channels]` float32: `values` `[I]` of the inputs that read each channel, reduced by "amax" or "mean"."""
    result = torch.zeros(channels).scatter_reduce_(0, consumer.channel_of, values.float(), reduce, include_self=False)
    return result.clamp_(min=max(result.max().item() * _SMALLEST, 1e-30))
