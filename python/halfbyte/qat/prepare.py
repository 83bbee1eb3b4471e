"""`hb.prepare_qat_`: layers replaced by ones that train with fake quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback, OnFallback, announce
from halfbyte.formats import FloatFormat, IntFormat
from halfbyte.fusion import find_batch_norms
from halfbyte.parts import ModelInParts
from halfbyte.plan import Plan, PlanRow
from halfbyte.planning import plan
from halfbyte.preparation import with_checked_weights
from halfbyte.qat.batchnorm import QATBatchNorm
from halfbyte.qat.modules import QATModule, qat_type
from halfbyte.qat.quantizer_base import WeightQuantizer
from halfbyte.qat.quantizers import activation_quantizer, weight_quantizer
from halfbyte.qat.state import QATState, Schedule, remember
from halfbyte.recipe import Pattern, Recipe, check_patterns, last_match
from halfbyte.schemes import Scheme
from halfbyte.swap import interrupts_deferred, put_parts_in_place, replace_module
from halfbyte.targets import disable_fast_paths


def prepare_qat_(
    model: nn.Module,
    recipe: Scheme | Recipe | Plan,
    example_inputs: object = None,
    *,
    weights: str | Mapping[Pattern, str] = "auto",
    activations: str | Mapping[Pattern, str] = "auto",
    schedule: Schedule | None = None,
    on_fallback: OnFallback = "warn",
) -> nn.Module:
    """Prepares a model for quantization-aware training: train it as always, then call `convert_`.

    Layers with a scheme are replaced by subclasses of theirs that hold the same parameters, compute with fake-quantized
    weights and inputs in training mode and with the integers that they will be converted to in evaluation mode.

    Args:
        model: Any module with float weights on the CPU.
        recipe: A scheme, a `Recipe` with overrides (mixed precision), or a `Plan`, such as an allocation of the bit search.
        example_inputs: One batch, as for `fuse_`: shows which batch normalization follows which layer, so that the layer
            trains with it folded into its weight.
        weights: How scales of weights are found: see `qat.weight_quantizer`. One method for all layers, or patterns to methods
            as the overrides of a `Recipe` have them: the last that matches wins, layers that none names have "auto".
        activations: The same for static activations: see `qat.activation_quantizer`.
        schedule: When fake quantization starts, and what is frozen when.
        on_fallback: As in `quantize_`.

    Returns:
        The model.

    Raises:
        QuantizationError: as `quantize_`, or the model is prepared already. The model is as it was.
        ValueError: a method is unknown or does not fit the layer's format. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> data = [(torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])) for _ in range(2)]
        >>> _ = hb.prepare_qat_(model, hb.int8_static(), data[0][0])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> for x, label in data:
        ...     nn.functional.cross_entropy(model(x), label).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> _ = model.eval()
        >>> before = model(data[0][0])
        >>> report = hb.convert_(model)
        >>> torch.equal(model(data[0][0]), before)
        True
    """
    announce((), on_fallback)
    if any(isinstance(module, QATModule) for module in model.modules()):
        raise QuantizationError("the model is prepared for training already; train it, then call hb.convert_(model)")
    if hasattr(model, "_halfbyte_preparation"):
        raise QuantizationError("hb.prepare_ prepared the model for calibration; finish with hb.convert_(model)")
    made = plan(model, recipe)
    view = ModelInParts.of(model, made.taken_apart)
    weight_methods = _methods("weights", weights, made, view)
    activation_methods = _methods("activations", activations, made, view)
    made = with_checked_weights(made, view.modules)
    pairs: dict[str, str] = {}
    kept = _batch_norms(model)
    if kept and example_inputs is not None:
        pairs, kept = find_batch_norms(model, example_inputs)
    made, pairs = _with_batch_norms(made, pairs, kept, traced=example_inputs is not None)
    made, from_scratch = _from_scratch(model, made, pairs, weight_methods)
    weight_methods |= dict.fromkeys(from_scratch, "lsq")
    _check_embeddings(view, made)
    announce(made.fallbacks, on_fallback)
    undo = put_parts_in_place(model, made.taken_apart)
    try:
        swaps = _new_modules(model, made, pairs, weight_methods, activation_methods)
        state = QATState(plan=made, batch_norms=pairs, schedule=schedule)
    except BaseException:
        undo()
        raise
    with interrupts_deferred():
        for names, module in swaps:
            replace_module(model, names, module)
        disable_fast_paths(model)
        remember(model, state)
    if schedule is not None and schedule.start:
        for module in model.modules():
            if isinstance(module, QATModule):
                module.switch("weights", False)
                module.switch("activations", False)
    return model


def _methods(argument: str, given: object, made: Plan, view: ModelInParts) -> dict[str, str]:
    """The method of each layer that has a scheme."""
    if isinstance(given, str):
        return {row.name: given for row in made.targets}
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}={given!r} is neither a method nor patterns to methods")
    for pattern, method in given.items():
        if not isinstance(pattern, str | type) or not isinstance(method, str):
            raise TypeError(f"{argument}[{pattern!r}]={method!r}: give names or module types, and the names of methods")
    wholes = {row.name: view.whole(row.name) for row in made.targets}
    layers = {name: view.modules[name] for name in wholes}
    check_patterns(given, {**layers, **dict(whole for whole in wholes.values() if whole)}, f"pattern of {argument}")
    found = {name: last_match(given, name, module, wholes[name]) for name, module in layers.items()}
    return {name: "auto" if pattern is None else given[pattern] for name, pattern in found.items()}


def _check_embeddings(view: ModelInParts, made: Plan) -> None:
    for row in made.targets:
        if getattr(view.modules[row.name], "sparse", False):
            raise QuantizationError(
                f"{row.name} has sparse=True; gradients of fake quantization are dense: use sparse=False, or leave it out "
                f"with hb.Recipe(..., overrides={{{row.name!r}: None}})"
            )


def _batch_norms(model: nn.Module) -> dict[str, str]:
    reason = "give example_inputs, which show what it follows, so that it is folded in training"
    return {
        name: reason
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    }


def _with_batch_norms(
    made: Plan, pairs: dict[str, str], kept: Mapping[str, str], *, traced: bool
) -> tuple[Plan, dict[str, str]]:
    """The plan with what becomes of each batch normalization, and the pairs whose layer has a scheme."""
    rows = {row.name: row for row in made.rows}
    pairs = {layer: norm for layer, norm in pairs.items() if layer in rows and rows[layer].scheme is not None}
    for layer, norm in pairs.items():
        bias_bytes = 0 if rows[layer].shape is None else 4 * rows[layer].shape[0]  # type: ignore[index]
        rows[norm] = replace(rows[norm], bytes_after=0, reason=f"folded into {layer}")
        rows[layer] = replace(rows[layer], bytes_after=rows[layer].bytes_after + bias_bytes)
    for norm, reason in kept.items():
        if norm in rows and (not traced or "has no weights" not in reason):
            fallback = Fallback(norm, "batch_norm", f"it is not folded in training: {reason}")
            rows[norm] = replace(rows[norm], fallbacks=(*rows[norm].fallbacks, fallback))
    return Plan(rows=tuple(rows.values())), pairs


def _from_scratch(
    model: nn.Module, made: Plan, pairs: Mapping[str, str], methods: Mapping[str, str]
) -> tuple[Plan, list[str]]:
    """Layers with "learned" scales whose batch normalization never ran, with the fallback that says how they are trained.

    Its running variance, and with it the weight that it is folded into, moves further in the first steps than a logarithm
    that is trained at the rate of the weights can follow.
    """
    names, rows = [], []
    for row in made.rows:
        norm = model.get_submodule(pairs[row.name]) if row.name in pairs else None
        steps = None if norm is None else norm.num_batches_tracked
        weight_format = None if row.scheme is None else row.scheme.weight
        if (
            methods.get(row.name) == "learned"
            and isinstance(steps, Tensor)
            and int(steps) == 0
            and isinstance(weight_format, IntFormat)
            and weight_format.symmetric
        ):
            names.append(row.name)
            message = "its batch normalization never ran: scales of weights are trained as 'lsq' does, not as 'learned'"
            row = replace(row, fallbacks=(*row.fallbacks, Fallback(row.name, "batch_norm", message)))
        rows.append(row)
    return Plan(rows=tuple(rows)), names


def _new_modules(
    model: nn.Module, made: Plan, pairs: dict[str, str], weights: Mapping[str, str], activations: Mapping[str, str]
) -> list[tuple[tuple[str, ...], nn.Module]]:
    """What takes the place of which names."""
    swaps: list[tuple[tuple[str, ...], nn.Module]] = []
    quantizers: dict[str, WeightQuantizer] = {}
    for row in sorted(made.targets, key=lambda row: row.tied_to is not None):  # owners of a shared weight first
        old, norm = model.get_submodule(row.name), None
        if row.name in pairs:
            name = pairs[row.name]
            before = model.get_submodule(name)
            norm = QATBatchNorm.of(before)  # type: ignore[arg-type]
            names = tuple(n for n, module in model.named_modules(remove_duplicate=False) if module is before)
            swaps.append((names, norm))
        assert row.scheme is not None and row.shape is not None
        quantizer = quantizers.get(row.tied_to or "")
        made_here = quantizer is None
        if quantizer is None:
            with _naming(row.name):
                quantizer = weight_quantizer(row.scheme.weight, row.shape, weights[row.name])
        quantizers[row.name] = quantizer
        with _naming(row.name):
            of_input = _input_quantizer(old, row, activations[row.name])
        module = qat_type(old).of(old, row.name, row.scheme, row.layout, quantizer, of_input, norm)
        if made_here:
            matrix, _ = module.folded()
            quantizer.initialize(matrix.detach())
        swaps.append(((row.name, *row.aliases), module))
    return swaps


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """What is wrong with the method of a layer, with the layer's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error


def _input_quantizer(old: nn.Module, row: PlanRow, method: str) -> nn.Module | None:
    assert row.scheme is not None
    if row.scheme.activation is None or isinstance(row.scheme.weight, FloatFormat):
        return None
    per_sample = not isinstance(old, nn.Linear)
    return activation_quantizer(row.scheme.activation, method, name=f"the input of {row.name}", per_sample=per_sample)
