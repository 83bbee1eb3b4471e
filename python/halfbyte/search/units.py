"""What a search decides about: modules that get one scheme together, and what each scheme costs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from halfbyte.errors import QuantizationError
from halfbyte.plan import Plan
from halfbyte.planning import plan
from halfbyte.recipe import Recipe, matches
from halfbyte.schemes import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One decision: modules that share a weight, or that the user grouped, or a single module.

    Attributes:
        name: Name of the first module.
        modules: Qualified names, in the order of the model.
        weights: Weights that they have together, a shared one counted once.
        table: Whether one of them is an embedding.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    table: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One unit in one scheme.

    Attributes:
        loss: What it adds to the loss.
        margin: Half width of the 95 % confidence interval of that.
        bytes: Of the unit as saved.
    """

    loss: float
    margin: float
    bytes: int


def find_units(model: nn.Module, scheme: Scheme, groups: Sequence[Sequence[str]] = ()) -> tuple[Unit, ...]:
    """The modules of a model that can be quantized, those tied together as one.

    Args:
        model: Any module.
        scheme: A scheme that the modules could get.
        groups: Sequences of name patterns: modules below the same parent that match one of a sequence are one unit,
            such as `("*.q_proj", "*.k_proj", "*.v_proj")`.

    Raises:
        QuantizationError: nothing can be quantized, or a pattern matches no such module.
    """
    resolved = plan(model, Recipe(default=scheme))
    first: dict[str, str] = {}  # module -> module that stands for its unit
    weights: dict[str, int] = {}
    tables: set[str] = set()
    for row in resolved.targets:
        root = row.part_of or row.name
        first.setdefault(root, root)
        if row.shape is not None and row.tied_to is None:
            weights[root] = weights.get(root, 0) + row.shape[0] * row.shape[1]
        if row.kernel.startswith("gather"):
            tables.add(root)
    for row in resolved.targets:
        if row.tied_to is not None:
            _join(first, row.part_of or row.name, _root_of(resolved, row.tied_to))
    for patterns in groups:
        if isinstance(patterns, str):
            raise TypeError(
                f"groups={groups!r}: each group is a sequence of patterns, such as ('*.q_proj', '*.k_proj')"
            )
        _join_matching(first, patterns)
    order = list(first)
    units: dict[str, list[str]] = {}
    for name in order:
        units.setdefault(_find(first, name), []).append(name)
    return tuple(
        Unit(
            name=names[0],
            modules=tuple(names),
            weights=sum(weights.get(name, 0) for name in names),
            table=any(name in tables for name in names),
        )
        for names in units.values()
    )


def _root_of(resolved: Plan, name: str) -> str:
    return next(row.part_of or row.name for row in resolved.rows if row.name == name)


def _join_matching(first: dict[str, str], patterns: Sequence[str]) -> None:
    by_parent: dict[str, list[str]] = {}
    for pattern in patterns:
        matching = [name for name in first if matches(pattern, name)]
        if not matching:
            raise QuantizationError(f"group pattern {pattern!r} matches no module that can be quantized")
        for name in matching:
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_parent.values():
        for name in names[1:]:
            _join(first, names[0], name)


def _find(first: dict[str, str], name: str) -> str:
    while first[name] != name:
        name = first[name]
    return name


def _join(first: dict[str, str], a: str, b: str) -> None:
    a, b = _find(first, a), _find(first, b)
    first[max(a, b, key=list(first).index)] = min(a, b, key=list(first).index)
