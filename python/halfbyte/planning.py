"""Plans made: a recipe resolved against one model, before any work is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from halfbyte._extension import cpu_capability
from halfbyte.convolution import CONV_TYPES
from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback
from halfbyte.formats import CodebookFormat, FloatFormat, Format, IntFormat, PerAxis, PerGroup
from halfbyte.nn import QuantizedConv, QuantizedModule
from halfbyte.nn.packed_weight import packed_bytes
from halfbyte.nn.quantized_module import ACTIVATION_BUFFERS
from halfbyte.ops import Layout
from halfbyte.parametrized import why_resolved
from halfbyte.parts import ModelInParts, take_apart
from halfbyte.plan import Plan, PlanRow
from halfbyte.recipe import Pattern, Recipe, as_recipe
from halfbyte.schemes import Scheme, int8_dynamic
from halfbyte.targets import is_converted, is_target, weight_shape, why_float

_SMALLEST_FALLBACK_GROUP = 8
_ACTIVATION_BYTES = sum(dtype.itemsize for dtype in ACTIVATION_BUFFERS.values())  # of a module with static activations
_WRAP_IT = "the model itself is a {}, which cannot replace itself; wrap it: nn.Sequential(model)"


def plan(
    model: nn.Module,
    recipe: Scheme | Recipe | Plan,
    *,
    algorithms: Sequence[object] = (),
    tokens: int | None = None,
) -> Plan:
    """Resolves a recipe against a model; nothing is changed and no weight is read.

    Args:
        model: Any module; it may be on the meta device.
        recipe: A scheme, a recipe, or a plan made for this model (returned after a check).
        algorithms: What `quantize_` will get; only `work` depends on it.
        tokens: Tokens of calibration data. With it the plan says what memory and time it takes (`Plan.work`), for which this
            machine is measured for a second or two.

    Returns:
        One row for every module that owns parameters or buffers: scheme, bytes before and after, kernel on this CPU, and why
        anything stays in floating point.

    Raises:
        QuantizationError: a pattern that matches nothing, a model that is quantized already or has nothing to quantize, a
            plan made for another model.
        TypeError: `recipe` is none of the three.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
        >>> [str(row.scheme) for row in hb.plan(model, hb.int8_weight_only()).rows]
        ['int8 per channel, float activations', 'None']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass an nn.Module")
    made = _resolved(model, recipe)
    if tokens is None:
        return made
    from halfbyte.work import predict  # here: it needs the algorithms, which need plans

    return replace(made, work=predict(model, made, algorithms, tokens))


def _resolved(model: nn.Module, recipe: Scheme | Recipe | Plan) -> Plan:
    if isinstance(recipe, Plan):
        _check_plan_fits(model, recipe)
        return recipe
    recipe = as_recipe(recipe)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_converted(module):
            raise QuantizationError(
                f"{name or 'the model'} is quantized already; quantize the original model, with a recipe that names "
                "every module that differs"
            )
    if isinstance(take_apart(model), nn.Module):
        raise QuantizationError(_WRAP_IT.format(type(model).__name__))
    view = ModelInParts.of(model)
    recipe.check_patterns({**view.named(), **dict(model.named_modules(remove_duplicate=False))})
    resolved = _Resolver(model, view, recipe).resolve()
    if not any(row.scheme is not None for row in resolved.rows):
        raise QuantizationError(_nothing_to_quantize(resolved))
    return resolved


@dataclass(slots=True)
class _Choice:
    """Scheme of one target while ties and sizes are being settled."""

    scheme: Scheme | None
    override: Pattern | None
    reason: str = ""
    fallbacks: tuple[Fallback, ...] = ()
    tied_to: str | None = None
    layout: Layout = "tiles"


class _Resolver:
    def __init__(self, model: nn.Module, view: ModelInParts, recipe: Recipe) -> None:
        self.model = model
        self.view = view
        self.modules = view.modules
        self.recipe = recipe
        self.owners: dict[int, list[str]] = {}  # id of a parameter -> names of the modules that own it
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(name)

    def resolve(self) -> Plan:
        choices = {name: self._choose(name) for name, module in self.modules.items() if is_target(module)}
        for owners in self.owners.values():
            tied = [name for name in owners if name in choices]
            if len(owners) > 1 and tied and _is_weight_of_all(self.modules, owners):
                self._settle_tie([choices[name] for name in tied], tied)
            elif len(owners) > 1 and tied:
                for name in tied:
                    if choices[name].scheme is not None and self._weight_is_shared(name, owners):
                        others = ", ".join(o for o in owners if o != name)
                        choices[name] = _Choice(None, None, f"its weight is shared with {others}, which stays in float")
        for name, choice in choices.items():
            self._fit_group_size(name, choice)
        self._leave_whole(choices)
        asked = any(s is not None and s.attention for s in (self.recipe.default, *self.recipe.overrides.values()))
        if asked and not any(c.scheme is not None and c.scheme.attention for c in choices.values()):
            raise QuantizationError(
                "hb.int8_attention names no nn.MultiheadAttention whose q_proj is quantized; give the scheme without it"
            )
        return Plan(rows=tuple(self._rows(choices)))

    def _leave_whole(self, choices: dict[str, _Choice]) -> None:
        """Sees a module in one piece again if none of its parts gets a scheme."""
        taken_apart: set[str] = set()
        for whole in self.view.wholes:
            parts = {name: choices.pop(name) for name in self.view.parts(whole) if name in choices}
            if any(choice.scheme is not None for choice in parts.values()):
                choices.update(parts)
                taken_apart.add(whole)
            else:
                choices[whole] = _Choice(None, None, "; ".join(dict.fromkeys(c.reason for c in parts.values())))
        self.view = ModelInParts.of(self.model, taken_apart)
        self.modules = self.view.modules

    def _weight_is_shared(self, name: str, owners: list[str]) -> bool:
        weight = self.modules[name]._parameters.get("weight")
        return weight is not None and self.owners[id(weight)] == owners

    def _choose(self, name: str) -> _Choice:
        module = self.modules[name]
        reason = why_float(name, module, self.modules)
        if reason is not None:
            return _Choice(None, None, reason)
        if name == "":
            raise QuantizationError(_WRAP_IT.format(type(module).__name__))
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if not weight.is_floating_point():
            raise QuantizationError(f"{name}: weight has dtype {weight.dtype}; quantize floating-point weights")
        scheme, override = self._resolve(name)
        whole = self.view.whole(name)
        choice = _Choice(scheme, override, reason=(why_resolved(whole[1]) or "") if whole else "")
        if scheme is None:
            choice.reason = "left as it is by the recipe"
        elif isinstance(scheme.weight, FloatFormat) and scheme.weight.dtype == weight.dtype:
            choice.scheme, choice.reason = None, f"is {scheme.weight} already"
        elif isinstance(module, nn.Embedding):
            choice.layout = "rows"
            choice.scheme = _table_scheme(scheme) if override is None else Scheme(weight=scheme.weight)
            if choice.scheme.static:
                choice.scheme = Scheme(weight=choice.scheme.weight)
            if choice.scheme.weight != scheme.weight:
                choice.reason = "tables keep 8 bits unless an override names them"
        elif isinstance(module, CONV_TYPES) and scheme.asymmetric_rows:
            choice.scheme = replace(scheme, activation=int8_dynamic().activation)
            message = "convolutions have no asymmetric dynamic activations: symmetric ones are used"
            choice.fallbacks += (Fallback(name, "activation", message),)
        return choice

    def _resolve(self, name: str) -> tuple[Scheme | None, Pattern | None]:
        whole = self.view.whole(name)
        scheme, override = self.recipe.resolve(name, self.modules[name], whole)
        if scheme is not None and scheme.attention and not _speaks_for_attention(name, whole):
            scheme = replace(scheme, attention=False)
        return scheme, override

    def _settle_tie(self, choices: list[_Choice], names: list[str]) -> None:
        """Modules that share one weight get one format, unless overrides name different ones."""
        if any(why_float(name, self.modules[name], self.modules) for name in names):
            for choice in choices:
                choice.scheme, choice.reason = None, choice.reason or f"its weight is shared with {names[0]}"
            return
        explicit = {c.scheme.weight if c.scheme else None for c in choices if c.override is not None}
        if len(explicit) > 1:
            first = next(i for i, c in enumerate(choices) if c.scheme is not None)
            message = f"{' and '.join(names)} share one weight but got different formats: it is stored once for each"
            choices[first].fallbacks += (Fallback(names[first], "tied_weights", message),)
            return
        table = any(isinstance(self.modules[name], nn.Embedding) for name in names)
        for name, choice in zip(names, choices, strict=True):
            scheme, _ = self._resolve(name)
            if explicit:
                (weight_format,) = explicit
                choice.scheme = _with_weight(scheme, weight_format)
                if choice.override is None:
                    choice.reason = "follows the override of the module it shares its weight with"
            elif table and scheme is not None:
                choice.scheme = _table_scheme(scheme)
                if choice.scheme.weight != scheme.weight:
                    choice.reason = "tables keep 8 bits unless an override names them"
            if isinstance(self.modules[name], nn.Embedding) and choice.scheme is not None:
                choice.scheme = Scheme(weight=choice.scheme.weight)
        linear = [name for name in names if not isinstance(self.modules[name], nn.Embedding)]
        home = (linear or names)[0]
        for name, choice in zip(names, choices, strict=True):
            choice.layout = "tiles" if linear else "rows"
            choice.tied_to = home if name != home and choice.scheme is not None else None

    def _fit_group_size(self, name: str, choice: _Choice) -> None:
        if choice.scheme is None or isinstance(choice.scheme.weight, FloatFormat):
            return
        weight_format = choice.scheme.weight
        if not isinstance(weight_format.granularity, PerGroup):
            return
        _, in_features = weight_shape(self.modules[name])
        asked = weight_format.granularity.group_size
        if in_features % asked == 0:
            return
        fitting = fitting_group_size(in_features, asked)
        choice.scheme = replace(choice.scheme, weight=weight_format.with_granularity(PerGroup(fitting)))
        message = f"group_size={asked} does not divide in_features={in_features}: group_size={fitting} is used"
        choice.fallbacks += (Fallback(name, "group_size", message),)

    def _rows(self, choices: dict[str, _Choice]) -> Iterator[PlanRow]:
        seen: set[int] = set()
        for name, module in self.modules.items():
            tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            if not tensors:
                continue
            weight = module._parameters.get("weight")
            weight_is_new = weight is not None and id(weight) not in seen
            before = _bytes_not_seen(tensors, seen)
            surplus = self._surplus_bytes(name)
            choice = choices.get(name) or _Choice(None, None, why_float(name, module, self.modules) or "")
            after, shape, kernel = before, None, "torch"
            whole = self.view.whole(name)
            if is_target(module):
                shape = weight_shape(module)
            if choice.scheme is not None and shape is not None and weight is not None:
                after -= weight.nbytes if weight_is_new else 0
                after += 0 if choice.tied_to else _weight_bytes(choice.scheme, choice.layout, shape)
                after += _ACTIVATION_BYTES if choice.scheme.static else 0
                kernel = kernel_name(module, choice.scheme)
            yield PlanRow(
                name=name,
                aliases=tuple(self.view.aliases[name]),
                module_type=type(module if whole is None else whole[1]).__name__,
                scheme=choice.scheme,
                reason=choice.reason,
                shape=shape,
                bytes_before=before + surplus,
                bytes_after=after,
                kernel=kernel,
                layout=choice.layout,
                tied_to=choice.tied_to,
                part_of=None if whole is None else whole[0],
                fallbacks=choice.fallbacks,
            )

    def _surplus_bytes(self, name: str) -> int:
        """What the parameters that a weight is computed from take beyond the weight, counted with the first part."""
        whole = self.view.whole(name)
        if whole is None or why_resolved(whole[1]) is None or name != next(self.view.parts(whole[0])):
            return 0
        own, parts = whole[1], self.modules[whole[0]]
        return sum(t.nbytes for t in (*own.parameters(), *own.buffers())) - sum(
            t.nbytes for t in (*parts.parameters(), *parts.buffers())
        )


def _speaks_for_attention(name: str, whole: tuple[str, nn.Module] | None) -> bool:
    """Whether it is the part whose scheme says how an attention module computes its scores and values."""
    return whole is not None and isinstance(whole[1], nn.MultiheadAttention) and name == f"{whole[0]}.q_proj"


def kernel_name(module: nn.Module, scheme: Scheme) -> str:
    """Operator, operand widths and ISA level, such as `matmul u4 s8 (avx512vnni)`.

    u integer codes, c codes of a codebook, s integer activations.
    """
    if isinstance(scheme.weight, FloatFormat):
        return f"torch {scheme.weight}"
    embedding = isinstance(module, nn.Embedding) or (
        isinstance(module, QuantizedModule) and hasattr(module, "num_embeddings")
    )
    codes = "c" if isinstance(scheme.weight, CodebookFormat) else "u"
    if embedding:
        return f"gather {codes}{scheme.weight.bits}"
    activation = "f32" if scheme.activation is None else "s8"
    if isinstance(module, (QuantizedConv, *CONV_TYPES)):
        level = "torch" if scheme.activation is None else cpu_capability()
        return f"conv {codes}{scheme.weight.bits} {activation} ({level})"
    return f"matmul {codes}{scheme.weight.bits} {activation} ({cpu_capability()})"


def fitting_group_size(in_features: int, asked: int) -> int:
    """The group size that stands in for one that does not divide `in_features`.

    The largest divisor below it, unless that is so small (under 8) that scales would outweigh codes; then the smallest divisor
    above it. `in_features` itself, one scale a row, always divides.

    Example:
        >>> fitting_group_size(48, 32), fitting_group_size(172, 32)
        (24, 43)
    """
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    below = max(size for size in divisors if size <= asked)
    if below >= _SMALLEST_FALLBACK_GROUP or below == in_features:
        return below
    return min(size for size in divisors if size > asked)


def _table_scheme(scheme: Scheme) -> Scheme:
    """The scheme of an embedding, and of an output head tied to one, under a default scheme: at least 8 bits a weight.

    A row of a table is read alone: its error reaches the model undiluted, and for the bytes of a language model's body the
    table's extra bits are cheap. llama.cpp and the GPTQ tools keep it wider for the same reason.
    """
    if not isinstance(scheme.weight, FloatFormat) and scheme.weight.bits < 8:
        return replace(scheme, weight=IntFormat(bits=8, granularity=PerAxis(0), narrow_range=True))
    return scheme


def _with_weight(scheme: Scheme | None, weight_format: Format | None) -> Scheme | None:
    if weight_format is None:
        return None
    if scheme is None or not isinstance(weight_format, IntFormat):
        return Scheme(weight=weight_format)
    return replace(scheme, weight=weight_format)


def _is_weight_of_all(modules: dict[str, nn.Module], owners: list[str]) -> bool:
    weights = {id(modules[name]._parameters.get("weight")) for name in owners}
    # Convolutions of different kinds make different matrices of one weight.
    kinds = {(m.transposed, m.groups) if isinstance(m, CONV_TYPES) else None for m in map(modules.__getitem__, owners)}
    return len(weights) == 1 and len(kinds) == 1 and all(is_target(modules[name]) for name in owners)


def _weight_bytes(scheme: Scheme, layout: Layout, shape: tuple[int, int]) -> int:
    if isinstance(scheme.weight, FloatFormat):
        return shape[0] * shape[1] * scheme.weight.dtype.itemsize
    return packed_bytes(scheme.weight, layout, shape)


def _bytes_not_seen(tensors: list[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.nbytes
    return total


def _check_plan_fits(model: nn.Module, made: Plan) -> None:
    modules = ModelInParts.of(model, made.taken_apart).modules
    for row in made.targets:
        module = modules.get(row.name)
        if module is None or not is_target(module):
            raise QuantizationError(f"the plan names {row.name}, which this model does not have; make a plan for it")
        if weight_shape(module) != row.shape:
            raise QuantizationError(
                f"the plan was made for another model: {row.name} has weight shape {weight_shape(module)}, not {row.shape}"
            )


def _nothing_to_quantize(resolved: Plan) -> str:
    if not resolved.rows:
        return "the model has no parameters: nothing to quantize"
    reasons = {f"{row.name or row.module_type}: {row.reason}" for row in resolved.rows if row.reason}
    listed = "; ".join(sorted(reasons)[:5])
    return f"nothing to quantize: no nn.Linear, nn.Embedding or convolution gets a scheme ({listed})"
