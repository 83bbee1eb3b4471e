"""Cross-layer equalization: scales move between two layers so that the channels of both have weights of like size.

Nagel et al. 2019 (arXiv:1906.04721). A channel between two layers may be divided by any positive number in the first one and
multiplied by it in the second, as long as what lies between keeps to it: `f(x / s) = f(x) / s`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.algorithms.transform import TransformContext, TransformRecord
from halfbyte.dataflow import Call, Dataflow, trace_dataflow
from halfbyte.fusion import FUSED_TYPES
from halfbyte.plan import Plan

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Of each channel alone, and of degree one.
_HOMOGENEOUS = frozenset(
    {"relu", "relu_", "leaky_relu", "leaky_relu_", "ReLU", "LeakyReLU", "pad", "mean", "contiguous", "to"}
    | {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)}
    | {f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)}
    | {f"{kind}Pad{d}d" for kind in ("Zero", "Reflection", "Replication") for d in (1, 2, 3)}
)
_BOUNDED = frozenset({"relu6", "ReLU6"})
_POSITIVE = frozenset({"relu", "relu_", "ReLU"})
_BOUND = 6.0 * (1 - 1e-3)


@dataclass(frozen=True, slots=True)
class _Pair:
    first: str
    second: str
    bounded: bool  # whether something between them cuts at 6
    positive: bool  # whether something between them cuts at 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossLayerEqualization:
    """Scales channels between pairs of layers until their weights have like ranges; the float model computes the same.

    Pairs are convolutions and linear layers with nothing between them but ReLU, leaky ReLU, ReLU6, pooling and padding, where
    nothing else reads what lies between, as an example run shows. Fold batch normalization in first (`hb.fuse_`).

    No channel is made larger than the largest one was on the calibration data, so that the range of the activations between
    does not grow: a channel with tiny weights and a large bias would stretch it for all (the paper absorbs such biases
    instead). A channel that passes a ReLU6 is scaled as far as its values stay below 6 before and after; one that reaches 6
    is left alone.

    Worth it for weights with one scale (`int8_static(per_channel=False)`), depthwise networks above all.

    Args:
        sweeps: Most passes over all pairs; a pair's scales change those of its neighbours.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> data = [torch.randn(2, 3, 8, 8)]
        >>> equalize = hb.algorithms.CrossLayerEqualization()
        >>> report = hb.quantize_(model, hb.int8_static(per_channel=False), data, algorithms=[equalize], progress=False)
        >>> report.transforms[0].producer, report.transforms[0].consumers
        ('0', ('2',))
    """

    sweeps: int = 20

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"sweeps={self.sweeps} is not positive; use e.g. 20")

    @property
    def needs_data(self) -> bool:
        """An example at least."""
        return True

    def check(self, plan: Plan) -> None:
        """Any plan may gain."""

    def calibration_bytes(self, plan: Plan) -> int:
        """Nothing beside the old weights, which are kept within their own budget."""
        return 0

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        """Equalizes all pairs, then shows that the model computes the same."""
        pairs = find_pairs(context.model, trace_dataflow(context.model, context.example.run))
        name = type(self).__name__
        if not pairs:
            reason = "no two layers follow one another with nothing but ReLU, pooling or padding between them"
            return [TransformRecord(transform=name, producer="", reason=reason, failed=True)]
        largest = _largest_values(context, pairs)
        layers = {layer for pair in pairs for layer in (pair.first, pair.second)}
        parameters = [
            p for layer in layers for p in context.model.get_submodule(layer)._parameters.values() if p is not None
        ]
        before = [(parameter, parameter.detach().clone()) for parameter in parameters]
        total = {pair: torch.ones(1) for pair in pairs}
        for _ in range(self.sweeps):
            change = 0.0
            for pair in pairs:
                scale = _scale(context.model, pair, largest[pair.first])
                _apply(context, pair, scale)
                largest[pair.first] = largest[pair.first] / scale
                total[pair] = total[pair] * scale
                change = max(change, float((scale - 1).abs().max()))
            if change < 1e-3:
                break

        def undo() -> None:
            for parameter, value in before:
                context.edits.write(parameter, value)

        changed, reason = context.example.prove(undo)
        return [
            TransformRecord(
                transform=name,
                producer=pair.first,
                consumers=(pair.second,),
                detail=f"scales {float(total[pair].min()):.3g} to {float(total[pair].max()):.3g}",
                change=None if reason else changed,
                reason=reason,
                failed=bool(reason),
            )
            for pair in pairs
        ]


def find_pairs(model: nn.Module, flow: Dataflow) -> list[_Pair]:
    """Layers that follow one another, each run once, with only what keeps to scales between them."""
    modules = dict(model.named_modules())
    owners: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    alone = {
        name
        for name, module in modules.items()
        if type(module) in FUSED_TYPES
        and len(flow.of_module(name)) == 1
        and all(p is None or owners[id(p)] == 1 for p in module._parameters.values())
        and "weight" in module._parameters
    }
    pairs = []
    for name in modules:
        if name not in alone:
            continue
        end, between = _next_layer(flow.of_module(name)[0], flow)
        if end is None or end.module not in alone or not _channels_fit(modules[name], modules[end.module]):
            continue
        pairs.append(_Pair(name, end.module, bool(between & _BOUNDED), bool(between & (_BOUNDED | _POSITIVE))))
    return pairs


def _next_layer(call: Call, flow: Dataflow) -> tuple[Call | None, set[str]]:
    """The layer that alone reads what a call gave, and the functions between; None if there is no such layer."""
    between: set[str] = set()
    while True:
        reader = flow.only_reader(call)
        if reader is None:
            return None, between
        if reader.function not in _HOMOGENEOUS | _BOUNDED:
            return (reader if reader.module else None), between
        between.add(reader.function)
        call = reader


def _channels_fit(first: nn.Module, second: nn.Module) -> bool:
    """Whether the outputs of one are the inputs of the other, one by one, and on the channel axis of both."""
    if isinstance(first, nn.Linear) and not isinstance(second, nn.Linear):
        return False
    return _outputs(first) == _inputs(second)


def _outputs(layer: nn.Module) -> int:
    size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(size, int)
    return size


def _inputs(layer: nn.Module) -> int:
    size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(size, int)
    return size


def _by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view with the output channel first and everything else in the second dimension's place, as rows."""
    if isinstance(layer, _TRANSPOSED):
        return weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).reshape(_outputs(layer), -1)
    return weight.reshape(_outputs(layer), -1)


def _by_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """The same with the input channel first."""
    if isinstance(layer, _TRANSPOSED):
        return weight.reshape(_inputs(layer), -1)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    assert isinstance(groups, int)
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).reshape(_inputs(layer), -1)


def _scale(model: nn.Module, pair: _Pair, largest: Tensor) -> Tensor:
    first, second = model.get_submodule(pair.first), model.get_submodule(pair.second)
    assert isinstance(first.weight, Tensor) and isinstance(second.weight, Tensor)
    one = _by_output(first, first.weight.detach().float()).abs().amax(1)
    two = _by_input(second, second.weight.detach().float()).abs().amax(1)
    usable = (one > 0) & (two > 0)
    scale = torch.where(usable, (one / two.clamp(min=1e-30)).sqrt(), 1.0).clamp(1e-4, 1e4)
    scale = torch.maximum(scale, largest / largest.max().clamp(min=1e-30))
    if not pair.bounded:
        return scale
    return torch.where(largest < _BOUND, torch.maximum(scale, largest / _BOUND), 1.0)


def _apply(context: TransformContext, pair: _Pair, scale: Tensor) -> None:
    first, second = (context.model.get_submodule(name) for name in (pair.first, pair.second))
    assert isinstance(first.weight, nn.Parameter) and isinstance(second.weight, nn.Parameter)
    for layer, weight, rows, factor in (
        (first, first.weight, _by_output, 1 / scale),
        (second, second.weight, _by_input, scale),
    ):
        index = rows(layer, torch.arange(weight.numel()).view(weight.shape))  # of each channel's weights
        values = weight.detach().clone().flatten()
        values[index] = values[index] * factor[:, None].to(values.dtype)
        context.edits.write(weight, values.view(weight.shape))
    bias = first._parameters["bias"]
    if bias is not None:
        context.edits.write(bias, bias.detach() / scale.to(bias.dtype))


@dataclass(slots=True)
class _LargestOutput:
    positive: bool
    values: Tensor | None = None

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        channels = output.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1).float()
        found = channels.amax(1).clamp(min=0) if self.positive else channels.abs().amax(1)
        self.values = found if self.values is None else torch.maximum(self.values, found)


def _largest_values(context: TransformContext, pairs: list[_Pair]) -> dict[str, Tensor]:
    """Largest value of each channel between two layers, over the calibration data."""
    hooks = {pair.first: _LargestOutput(pair.positive) for pair in pairs}
    with ExitStack() as handles:
        for name, hook in hooks.items():
            handles.callback(context.model.get_submodule(name).register_forward_hook(hook).remove)
        for batch in context.batches:
            context.run(batch)
    return {name: hook.values for name, hook in hooks.items() if hook.values is not None}
