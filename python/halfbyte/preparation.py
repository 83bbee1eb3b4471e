"""What is known before a conversion starts: a checked plan, its algorithms, and the statistics of a calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.activation import InputObserver
from halfbyte.algorithms import (
    AWQ,
    RTN,
    BiasCorrection,
    HessianRounding,
    InputMean,
    Rotation,
    Rounding,
    SmoothQuant,
    Transform,
    TransformContext,
    TransformRecord,
    default_rounding,
)
from halfbyte.calibration import Forward, InputStatistics, evaluating
from halfbyte.edits import WeightEdits
from halfbyte.errors import QuantizationError
from halfbyte.fallback import Fallback, OnFallback, announce
from halfbyte.flow import section_bytes
from halfbyte.formats import CodebookFormat, FloatFormat, IntFormat
from halfbyte.hessian import InputHessian, hessian_bytes
from halfbyte.memory import Budget, MemorySize, conversion_budget
from halfbyte.nn.packed_weight import packed_bytes
from halfbyte.parts import ModelInParts
from halfbyte.plan import Plan, PlanRow
from halfbyte.planning import plan
from halfbyte.processes import Processes
from halfbyte.recipe import Recipe
from halfbyte.schemes import Scheme
from halfbyte.sequential import without_cache
from halfbyte.targets import weight_matrix

Algorithm: TypeAlias = Transform | Rounding | BiasCorrection


PREPARATION = "_halfbyte_preparation"  # attribute of a prepared model


def preparation_of(model: nn.Module) -> Preparation | None:
    """What `prepare_` left in a model that was not converted yet."""
    found = model.__dict__.get(PREPARATION)
    return found if isinstance(found, Preparation) else None


@dataclass(slots=True, kw_only=True)
class Preparation:
    """A checked plan with its algorithms, and the statistics gathered so far."""

    plan: Plan
    transforms: tuple[Transform, ...]
    algorithms: tuple[Rounding, ...]
    on_fallback: OnFallback
    budget: Budget
    statistics: dict[str, InputStatistics]
    ranges: dict[str, InputObserver]
    corrections: tuple[BiasCorrection, ...] = ()
    means: dict[str, InputMean] = field(default_factory=dict)
    corrected: frozenset[str] = frozenset()  # layers whose bias makes up for the mean error
    evened: frozenset[str] = frozenset()  # layers whose rounding evens errors out on the mean input
    batches: int = 0
    records: tuple[TransformRecord, ...] = ()

    @staticmethod
    def of(
        model: nn.Module,
        recipe: Scheme | Recipe | Plan,
        algorithms: Sequence[Algorithm],
        max_memory: MemorySize | None,
        on_fallback: OnFallback,
        *,
        in_order: bool = False,
        resident: int | None = None,
    ) -> Preparation:
        """Resolves and checks everything that can be checked before work.

        With `in_order`, Hessians exist one layer at a time; otherwise those of all layers do until the model is converted.
        With `resident`, only that many bytes of the model are in memory at a time, and weights are checked when they are.
        """
        announce((), on_fallback)
        transforms, corrections, chosen = _check_algorithms(algorithms)
        made = plan(model, recipe)
        for transform in transforms:
            transform.check(made)
        modules = ModelInParts.of(model, made.taken_apart).modules
        inputs = [row for row in made.targets if _has_inputs(modules[row.name], made, row)]
        last = chosen[-1] if chosen else None
        hessian = isinstance(last, HessianRounding)
        drift = in_order and isinstance(last, HessianRounding) and last.needs_drift
        calibration = calibration_bytes(model, inputs, in_order=in_order, drift=drift) if hessian else 0
        calibration = max([calibration, *(transform.calibration_bytes(made) for transform in transforms)])
        budget = conversion_budget(
            made, max_memory, calibration=calibration, resident=resident, hessian=hessian, in_order=in_order and hessian
        )
        if resident is None:
            made = with_checked_weights(made, modules)
        if corrections:
            rows = {row.name for row in inputs if not _has_bias(modules[row.name])}
            made = Plan(rows=tuple(_without_correction(row) if row.name in rows else row for row in made.rows))
        announce(made.fallbacks, on_fallback)
        with_hessian = {row.name for row in inputs} if hessian else set()
        evened = {row.name for row in inputs if not chosen and _evened(row)}
        corrected = {row.name for row in inputs if corrections or row.name in evened}
        corrected = {name for name in corrected if _has_bias(modules[name])}
        statistics = {
            row.name: InputHessian(row.name) if row.name in with_hessian else InputStatistics(row.name)
            for row in made.targets
            if _observed(modules[row.name], row) and _weighted(row, chosen)
        }
        ranges = {
            row.name: InputObserver(row.name, row.scheme)
            for row in made.targets
            if row.scheme is not None and row.scheme.static
        }
        return Preparation(
            plan=made,
            transforms=transforms,
            algorithms=chosen,
            on_fallback=on_fallback,
            budget=budget,
            statistics=statistics,
            ranges=ranges,
            corrections=corrections,
            means={row.name: InputMean() for row in inputs if row.name in corrected or row.name in evened},
            corrected=frozenset(corrected),
            evened=frozenset(evened),
        )

    @property
    def needing_data(self) -> list[str]:
        """What needs calibration data, in words."""
        algorithms: tuple[Algorithm, ...] = (*self.transforms, *self.corrections, *self.algorithms)
        names = list(dict.fromkeys(type(algorithm).__name__ for algorithm in algorithms if algorithm.needs_data))
        return names + (["a scheme with static activations"] if self.ranges else [])

    @property
    def settled(self) -> bool:
        """Whether every range of static activations that was seen has converged, and any was."""
        seen = [hook.observer for hook in self.ranges.values() if hook.observer.batches]
        return bool(seen) and all(observer.range().converged for observer in seen)

    def transform(
        self,
        model: nn.Module,
        batches: Sequence[object],
        forward: Forward | None,
        edits: WeightEdits,
        progress: bool,
        processes: Processes | None = None,
    ) -> None:
        """Lets the transforms change the float model, and checks its weights again."""
        with evaluating(model), without_cache(model):
            context = TransformContext(
                model=model,
                plan=self.plan,
                batches=batches,
                forward=forward,
                edits=edits,
                progress=progress,
                processes=processes,
            )
            for transform in self.transforms:
                self.records += tuple(transform.transform(context))
        modules = {row.name: model.get_submodule(row.name) for row in self.plan.rows}
        checked = with_checked_weights(self.plan, modules)
        new = set(checked.fallbacks) - set(self.plan.fallbacks)
        announce([*(f for r in self.records if (f := r.fallback)), *new], self.on_fallback)
        self.plan = checked

    def check_distributed(self) -> None:
        """Raises if a transform looks at batches and several processes cannot agree on what it finds."""
        alone = [type(t).__name__ for t in self.transforms if not isinstance(t, AWQ | SmoothQuant | Rotation)]
        if alone:
            raise QuantizationError(
                f"{', '.join(alone)} does not work with distributed=True; transform and save the float model in one process"
            )

    def observe(self, model: nn.Module) -> None:
        """Hooks the statistics to their modules."""
        for name, hook in self._hooks():
            model.get_submodule(name).register_forward_pre_hook(hook)

    def stop_observing(self, model: nn.Module) -> None:
        """Takes the hooks away, those that a copy of the model brought along included."""
        ours = {id(hook) for _, hook in self._hooks()}
        for module in model.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if id(hook) in ours]:
                del hooks[key]

    @property
    def has_data(self) -> bool:
        """Whether any batch reached a module that is observed."""
        ran = (hook.observer.batches for hook in self.ranges.values())
        return any(statistics.tokens for statistics in self.statistics.values()) or any(ran)

    @contextmanager
    def sharing(self, processes: Processes | None) -> Iterator[None]:
        """What is seen inside the block is this process's share of data that all of them see.

        If the block fails in one process it fails in all, and the statistics are as they were.
        """
        if processes is None:
            yield
            return
        hooks = [hook for _, hook in self._hooks()]
        for hook in hooks:
            hook.begin_share()
        try:
            with processes.failing_together():
                yield
        except BaseException:
            for hook in hooks:
                hook.abandon_share()
            raise
        for hook in hooks:
            hook.end_share()

    def _hooks(self) -> Iterator[tuple[str, InputStatistics | InputObserver | InputMean]]:
        yield from self.ranges.items()
        yield from self.means.items()
        yield from self.statistics.items()

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observes inside a `with` block."""
        self.observe(model)
        try:
            yield
        finally:
            self.stop_observing(model)

    @contextmanager
    def observing_ranges(self, model: nn.Module) -> Iterator[None]:
        """The same, but only the ranges of static activations and the means of inputs."""
        with replace(self, statistics={}).observing(model):
            yield

    def rounding_of(self, row: PlanRow) -> Rounding:
        """The algorithm that chooses the integers of a module."""
        assert row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)
        return self.algorithms[-1] if self.algorithms else default_rounding(row.scheme.weight)

    @property
    def hessian_rounding(self) -> HessianRounding | None:
        """The algorithm, if it needs Hessians."""
        last = self.algorithms[-1] if self.algorithms else None
        return last if isinstance(last, HessianRounding) else None

    def importance_of(self, row: PlanRow) -> Tensor | None:
        """Mean square of each input of a module, or its variance where the bias makes up for the mean; None if nothing ran."""
        if row.name not in self.statistics or not any(s.tokens for s in self.statistics.values()):
            return None
        mean_square = self.statistics[row.name].mean_square
        if row.name not in self.corrected:
            return mean_square
        return (mean_square - self.means[row.name].square_of_mean).clamp(min=0).float()


def _check_algorithms(
    algorithms: Sequence[Algorithm],
) -> tuple[tuple[Transform, ...], tuple[BiasCorrection, ...], tuple[Rounding, ...]]:
    """Transforms in their order, the bias correction, and the rounding, if any."""
    if isinstance(algorithms, Algorithm) or not isinstance(algorithms, Sequence):
        raise TypeError(f"algorithms={algorithms!r} is not a list; use algorithms=[hb.algorithms.MSE()]")
    for algorithm in algorithms:
        if isinstance(algorithm, type) or not isinstance(algorithm, Algorithm):
            raise TypeError(f"{algorithm!r} is not an algorithm; use an instance such as hb.algorithms.MSE()")
    names = ", ".join(type(a).__name__ for a in algorithms)
    corrections = tuple(a for a in algorithms if isinstance(a, BiasCorrection))
    roundings = [a for a in algorithms if not isinstance(a, Transform | BiasCorrection)]
    if len(roundings) > 1:
        raise ValueError(f"algorithms=[{names}]: only one can choose the integers of a weight; name one")
    in_order = [a for a in algorithms if not isinstance(a, BiasCorrection)]
    if roundings and roundings[0] is not in_order[-1]:
        raise ValueError(f"algorithms=[{names}]: {type(roundings[0]).__name__} chooses the integers and comes last")
    # A transform may be a rounding too (AWQ), and chooses the integers where it comes last.
    last = tuple(a for a in in_order[-1:] if isinstance(a, Rounding))
    return tuple(a for a in algorithms if isinstance(a, Transform)), corrections, last


def _observed(module: nn.Module, row: PlanRow) -> bool:
    packed = row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)
    return packed and not isinstance(module, nn.Embedding)


def _evened(row: PlanRow) -> bool:
    """Whether the default rounding of a layer looks at its mean input: with a static scheme there is calibration data."""
    scheme = row.scheme
    return scheme is not None and scheme.static and isinstance(scheme.weight, IntFormat) and scheme.weight.bits > 1


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _without_correction(row: PlanRow) -> PlanRow:
    message = "it has no bias to correct"
    return replace(row, fallbacks=(*row.fallbacks, Fallback(row.name, "bias", message)))


def _weighted(row: PlanRow, algorithms: Sequence[Rounding]) -> bool:
    """Whether the rounding of a weight looks at the mean squares of its inputs; a static 8-bit scheme has other hooks."""
    assert row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)
    rounding = algorithms[-1] if algorithms else default_rounding(row.scheme.weight)
    return not (row.scheme.static and isinstance(rounding, RTN))


def _has_inputs(module: nn.Module, made: Plan, row: PlanRow) -> bool:
    """Whether all that is read of a module's weight are products with inputs: not a table, nor tied to one."""
    return _observed(module, row) and row.tied_to is None and all(row.name != other.tied_to for other in made.targets)


def calibration_bytes(model: nn.Module, inputs: Sequence[PlanRow], *, in_order: bool, drift: bool) -> int:
    """What Hessians take: one at a time and a copy of a block where layers are calibrated in order, else all of them."""
    in_features = [row.shape[1] for row in inputs if row.shape is not None]
    if not in_features:
        return 0
    kept = section_bytes(model, [row.name for row in inputs]) if in_order else sum(4 * size**2 for size in in_features)
    return hessian_bytes(max(in_features), drift=drift) + kept


def with_checked_weights(made: Plan, modules: Mapping[str, nn.Module]) -> Plan:
    """The plan, once all weights that it quantizes are found finite and on the CPU; scales that do not fit 16 bits get 32.

    Raises:
        QuantizationError: they are not.
    """
    return Plan(rows=tuple(check_weight(modules[row.name], row) for row in made.rows))


def check_weight(module: nn.Module, row: PlanRow) -> PlanRow:
    """Checks that a weight is on the CPU and finite, and that its scales fit their dtype; one pass over memory."""
    if row.scheme is None:
        return row
    weight = weight_matrix(module)
    if weight.device.type != "cpu":
        hint = "load the weights first" if weight.is_meta else "move the model to the CPU: model.cpu()"
        raise QuantizationError(f"{row.name}: weight is on device {weight.device}; {hint}")
    weight_format = row.scheme.weight
    group_size = (
        weight.shape[1] if isinstance(weight_format, FloatFormat) else weight_format.group_size(weight.shape[1])
    )
    low, high = ops.observe_minmax(weight, group_size=group_size)
    for name, bad in (("NaN", torch.isnan(low).any()), ("inf", torch.isinf(low).any() or torch.isinf(high).any())):
        if bad:
            raise QuantizationError(
                f"{row.name}: weight has {name}; repair the checkpoint, or leave the module in float"
            )
    if isinstance(weight_format, FloatFormat):
        limit = torch.finfo(weight_format.dtype).max
        if max(high.max().item(), -low.min().item()) > limit:
            raise QuantizationError(
                f"{row.name}: weight has values past {limit:g}, the largest {weight_format}; use hb.bf16()"
            )
        return row
    if weight_format.scale_dtype != torch.float16:
        return row
    # The largest scale of each row, as min/max gives it: where even that is subnormal in float16, rounding would lose the row.
    span = torch.maximum(high, -low) if weight_format.symmetric else high.clamp(min=0) - low.clamp(max=0)
    steps = weight_format.reach if isinstance(weight_format, CodebookFormat) else max(weight_format.qmax, 1)
    largest = span.amax(dim=1) / steps
    limits = torch.finfo(torch.float16)
    if largest.max().item() <= limits.max and not bool(((largest > 0) & (largest < limits.tiny)).any()):
        return row
    message = (
        f"scales between {largest.min().item():.1e} and {largest.max().item():.1e} do not fit float16: float32 is used"
    )
    scheme = replace(row.scheme, weight=replace(weight_format, scale_dtype=torch.float32))
    assert row.shape is not None
    added = packed_bytes(scheme.weight, row.layout, row.shape) - packed_bytes(weight_format, row.layout, row.shape)  # type: ignore[arg-type]
    fallback = Fallback(row.name, "scale_dtype", message)
    after = row.bytes_after if row.tied_to else row.bytes_after + added
    return replace(row, scheme=scheme, bytes_after=after, fallbacks=(*row.fallbacks, fallback))
