"""`hb.fuse_`: batch normalization folded into the layer before it, found from an example run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from halfbyte.calibration import evaluating, run_batch
from halfbyte.dataflow import Call, Dataflow, trace_dataflow
from halfbyte.errors import QuantizationError
from halfbyte.nn.folded import FoldedBatchNorm
from halfbyte.outputs import output_tensors
from halfbyte.swap import interrupts_deferred
from halfbyte.table import Table
from halfbyte.targets import is_converted

FUSED_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = {
    "relu": "ReLU", "relu_": "ReLU", "relu6": "ReLU6", "hardtanh": "Hardtanh", "hardtanh_": "Hardtanh", "silu": "SiLU",
    "silu_": "SiLU", "leaky_relu": "LeakyReLU", "leaky_relu_": "LeakyReLU", "hardswish": "Hardswish", "gelu": "GELU",
    "sigmoid": "Sigmoid", "clamp": "Hardtanh", "clamp_": "Hardtanh",
}  # fmt: skip
_LARGEST_CHANGE = 1e-4  # of an output, relative to its largest value: rounding of the folded weights


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer and what follows it.

    Attributes:
        layer: Qualified name of the convolution or linear layer.
        batch_norm: Name of the batch normalization that was folded into it; empty if none was.
        activation: The activation function that follows, `ReLU` or another, module or function; empty if none does. It stays
            where it is; the next layer's input is observed after it.
    """

    layer: str
    batch_norm: str
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionReport:
    """What `fuse_` did; prints as a table.

    Attributes:
        fused: Layers with what follows them.
        kept: Name of each batch normalization that stays, to the reason.
        change: Largest change of an output on the example, relative to its largest value.
    """

    fused: tuple[FusedLayer, ...]
    kept: dict[str, str]
    change: float

    def _table(self) -> Table:
        table = Table(["layer", "batch norm", "activation", "note"], right=set())
        for row in self.fused:
            table.add(row.layer, row.batch_norm, row.activation, "folded" if row.batch_norm else "")
        for name, reason in self.kept.items():
            table.add("", name, "", f"stays: {reason}")
        folded = sum(bool(row.batch_norm) for row in self.fused)
        table.total("total", f"{folded} folded", "", f"output changed by {self.change:.1e}")
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def fuse_(model: nn.Module, example_inputs: object) -> FusionReport:
    """Folds batch normalization into the convolution or linear layer before it, in place.

    What follows what is found by running the example: a normalization is folded where it reads what the layer gave, as
    long as nothing else does. The model runs in evaluation mode. Afterwards the example runs again; if its outputs are not the
    same up to rounding, everything is put back.

    Args:
        model: A float model. Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d are fused.
        example_inputs: A batch: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        What was folded, the activations that follow, and why each other batch normalization stays: it is in training mode,
        shared, or fed by something else; or what it reads is read elsewhere too.

    Raises:
        QuantizationError: the model is quantized already.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> hb.fuse_(model, torch.randn(1, 3, 8, 8)).fused
        (FusedLayer(layer='0', batch_norm='1', activation='ReLU'),)
        >>> model[1]
        FoldedBatchNorm(into='0')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass an nn.Module")
    for name, module in model.named_modules():
        if is_converted(module):
            raise QuantizationError(
                f"{name or 'the model'} is quantized already; fuse the float model, then quantize it"
            )
    training = {name for name, module in model.named_modules() if module.training}
    state = torch.get_rng_state()

    def run() -> dict[str, Tensor]:
        torch.set_rng_state(state)
        return {name: tensor.clone() for name, tensor in output_tensors(run_batch(model, example_inputs)).items()}

    with evaluating(model):
        expected = run()
        flow = trace_dataflow(model, lambda: run_batch(model, example_inputs))
        search = _Search(model, flow, training)
        found, kept = search.find()
        with interrupts_deferred():
            undo = [_fold(model, row.layer, row.batch_norm) for row in found if row.batch_norm]
        try:
            change = _change(expected, run())
        except BaseException:
            _undo(undo)
            raise
        if not change <= _LARGEST_CHANGE:
            _undo(undo)
            reason = f"folding changes the output by {change:.1e} of its largest value on the example: put back"
            kept |= {row.batch_norm: reason for row in found if row.batch_norm}
            found = [FusedLayer(row.layer, "", "" if row.batch_norm else row.activation) for row in found]
    return FusionReport(fused=tuple(row for row in found if row.batch_norm or row.activation), kept=kept, change=change)


def find_batch_norms(model: nn.Module, example_inputs: object) -> tuple[dict[str, str], dict[str, str]]:
    """Which batch normalizations could be folded, found as `fuse_` finds them; nothing is changed.

    Returns:
        Name of each layer that would take one in to the name of that one, and of each that stays to the reason.
    """
    with evaluating(model):
        flow = trace_dataflow(model, lambda: run_batch(model, example_inputs))
        found, kept = _Search(model, flow, set()).find()
    return {row.layer: row.batch_norm for row in found if row.batch_norm}, kept


@dataclass(slots=True)
class _Search:
    model: nn.Module
    flow: Dataflow
    training: set[str]

    def find(self) -> tuple[list[FusedLayer], dict[str, str]]:
        modules = dict(self.model.named_modules())
        layers: dict[str, str] = {}  # layer -> its batch normalization
        kept: dict[str, str] = {}
        for name, module in modules.items():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            layer = self._layer_before(name, module, modules)
            if isinstance(layer, Call):
                layers[layer.module] = name
            else:
                kept[name] = layer
        found = []
        for name, module in modules.items():
            if isinstance(module, FUSED_TYPES) and len(self.flow.of_module(name)) == 1:
                batch_norm = layers.get(name, "")
                activation = self._activation_after(self.flow.of_module(batch_norm or name)[0], modules)
                found.append(FusedLayer(name, batch_norm, activation))
        return found, kept

    def _layer_before(self, name: str, norm: nn.Module, modules: dict[str, nn.Module]) -> Call | str:
        """The call whose layer takes the normalization in, or why none does."""
        calls = self.flow.of_module(name)
        if type(norm) not in _NORMS:
            return f"{type(norm).__name__} computes something of its own"
        if name in self.training:
            return "it is in training mode, where its statistics still change; call model.eval() first"
        if norm.running_mean is None or norm.running_var is None:
            return "it keeps no running statistics"
        if norm._forward_hooks or norm._forward_pre_hooks:
            return "it has hooks"
        if len(calls) != 1 or not calls[0].inputs:
            return "the example does not reach it" if not calls else f"it is shared: it runs {len(calls)} times"
        source = self.flow.producer(calls[0].inputs[0])
        if source is None:
            before = self.flow.before_change(calls[0].inputs[0])
            return (
                "it reads an input of the model"
                if before is None
                else f"the output of {before.name} is changed in place"
            )
        layer = modules.get(source.module) if source.module else None
        if not isinstance(layer, FUSED_TYPES):
            return f"it follows {source.name}, which has no weights to fold it into"
        others = [reader.name for reader in self.flow.readers(source.outputs[0]) if reader.module != name]
        if others:
            return f"the output of {source.module} is also read by {', '.join(dict.fromkeys(others))}"
        if len(self.flow.of_module(source.module)) != 1:
            return f"{source.module} is shared: it runs {len(self.flow.of_module(source.module))} times"
        if isinstance(layer, nn.Linear) and source.shape is not None and len(source.shape) != 2:
            return (
                f"it does not normalize the features of {source.module}, whose output has shape {tuple(source.shape)}"
            )
        return self._why_weights_stay(source, layer) or source

    def _why_weights_stay(self, source: Call, layer: nn.Module) -> str:
        if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
            return f"the weight of {source.module} is parametrized"
        own = {id(p) for p in layer._parameters.values() if p is not None}
        owners = [
            name
            for name, module in self.model.named_modules()
            if module is not layer and any(id(p) in own for p in module._parameters.values())
        ]
        return f"the weight of {source.module} is shared with {', '.join(owners)}" if owners else ""

    def _activation_after(self, call: Call, modules: dict[str, nn.Module]) -> str:
        reader = self.flow.only_reader(call)
        if reader is None:
            return ""
        if reader.module:
            kind = type(modules[reader.module]).__name__
            return kind if kind in _ACTIVATIONS.values() else ""
        return _ACTIVATIONS.get(reader.function, "")


def fold_structure(model: nn.Module, layer_name: str, norm_name: str) -> Callable[[], None]:
    """Puts a marker in the place of a batch normalization and gives its layer a bias; the numbers are the caller's.

    Returns:
        What puts both back.
    """
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    weight, bias = layer.weight, layer._parameters["bias"]
    assert isinstance(weight, Tensor) and isinstance(norm.num_features, int)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is norm]
    marker = FoldedBatchNorm(layer_name)
    marker.train(norm.training)
    if bias is None:
        zeros = torch.zeros(norm.num_features, dtype=weight.dtype, device=weight.device)
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))
    _put(model, names, marker)

    def undo() -> None:
        layer._parameters["bias"] = bias
        _put(model, names, norm)

    return undo


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> Callable[[], None]:
    """`w x + b` followed by `(y - mean) / sqrt(var + eps) * gain + shift` as one layer."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    weight = layer.weight
    assert isinstance(weight, Tensor) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    old_weight = weight.detach().clone()
    before = layer._parameters["bias"]
    old_bias = None if before is None else before.detach().clone()
    undo_structure = fold_structure(model, layer_name, norm_name)
    bias = layer.bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight.double()
        shift = 0.0 if norm.bias is None else norm.bias.double()
        bias.copy_((bias.double() - norm.running_mean.double()) * factor + shift)
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            grouped = weight.double().reshape(
                layer.groups, -1, *weight.shape[1:]
            )  # [groups, C/groups, O/groups, *kernel]
            per_group = factor.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight.copy_((grouped * per_group).flatten(0, 1))
        else:
            weight.copy_(weight.double() * factor.view(-1, *[1] * (weight.dim() - 1)))

    def undo() -> None:
        with torch.no_grad():
            weight.copy_(old_weight)
            if old_bias is not None:
                bias.copy_(old_bias)
        undo_structure()

    return undo


def _undo(undo: list[Callable[[], None]]) -> None:
    with interrupts_deferred():
        for step in reversed(undo):
            step()


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = module


def _change(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Largest difference of an output, relative to its largest value; infinite if the outputs are not alike."""
    if expected.keys() != found.keys():
        return float("inf")
    largest = 0.0
    for name, before in expected.items():
        after = found[name]
        if before.shape != after.shape:
            return float("inf")
        if not before.is_floating_point() or not before.numel():
            continue
        scale = before.double().abs().max().clamp(min=1e-30)
        change = float((after.double() - before.double()).abs().max() / scale)
        largest = change if not change <= largest else largest  # NaN counts
    return largest
