"""Recipes: a default scheme, and overrides by module name or type."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import TypeAlias

from torch import nn

from halfbyte.errors import QuantizationError
from halfbyte.schemes import Scheme

Pattern: TypeAlias = str | type[nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A default scheme, and other schemes for the modules that patterns name.

    Args:
        default: Scheme of every module that no override names; None leaves them in floating point.
        overrides: Pattern to scheme, or to None to leave the module as it is. A pattern is a shell-style pattern on the
            qualified name (`"*.down_proj"`), a regular expression after `"re:"` that matches the whole name, or a module
            type. Of several that match, the last one wins.

    Example:
        >>> recipe = Recipe(default=hb.int4_weight_only(32), overrides={"lm_head": hb.int8_weight_only(), nn.Embedding: None})
    """

    default: Scheme | None
    overrides: Mapping[Pattern, Scheme | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.default is not None and not isinstance(self.default, Scheme):
            raise TypeError(f"default={self.default!r} is not a scheme; use e.g. hb.int8_dynamic()")
        for pattern, scheme in self.overrides.items():
            if not isinstance(pattern, str) and not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
                raise TypeError(f"override {pattern!r} is neither a name pattern nor a module type")
            if scheme is not None and not isinstance(scheme, Scheme):
                raise TypeError(f"override {pattern!r} gives {scheme!r}, which is not a scheme; use a scheme or None")
            if isinstance(pattern, str) and pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from error

    def check_patterns(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises if an override names none of `modules`.

        Raises:
            QuantizationError: with the names nearest to the pattern.
        """
        check_patterns(self.overrides, modules, "override")

    def resolve(
        self, name: str, module: nn.Module, whole: tuple[str, nn.Module] | None = None
    ) -> tuple[Scheme | None, Pattern | None]:
        """Scheme of one module, and the override that gave it (None for the default).

        What names the module `whole` that it is a part of names it too. A type is that of the whole: an override of `nn.Linear`
        does not mean the parts of an LSTM.
        """
        by = last_match(self.overrides, name, module, whole)
        return (self.default, None) if by is None else (self.overrides[by], by)


def as_recipe(scheme_or_recipe: object) -> Recipe:
    """A recipe from a scheme or a recipe.

    Raises:
        TypeError: anything else, with what is accepted.
    """
    if isinstance(scheme_or_recipe, Recipe):
        return scheme_or_recipe
    if isinstance(scheme_or_recipe, Scheme):
        return Recipe(default=scheme_or_recipe)
    if isinstance(scheme_or_recipe, FunctionType) and scheme_or_recipe.__module__ == "halfbyte.schemes":
        raise TypeError(f"{scheme_or_recipe.__name__} is a function; call it: hb.{scheme_or_recipe.__name__}()")
    raise TypeError(
        f"{scheme_or_recipe!r} is not a scheme, recipe or plan; use e.g. hb.int8_dynamic(), hb.int4_weight_only() or "
        "hb.Recipe(default=..., overrides={...})"
    )


def matches(pattern: Pattern, name: str, module: nn.Module | None = None) -> bool:
    """Whether a pattern names a module; without the module itself, no type does."""
    if not isinstance(pattern, str):
        return isinstance(module, pattern)
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def check_patterns(patterns: Iterable[Pattern], modules: Mapping[str, nn.Module], what: str) -> None:
    """Raises if one of `patterns` names none of `modules`.

    Raises:
        QuantizationError: with the names nearest to the pattern, which it calls `what`.
    """
    for pattern in patterns:
        if not any(matches(pattern, name, module) for name, module in modules.items()):
            raise QuantizationError(
                f"{what} {show_pattern(pattern)} matches no module; {_suggestion(pattern, modules)}"
            )


def last_match(
    patterns: Iterable[Pattern], name: str, module: nn.Module, whole: tuple[str, nn.Module] | None = None
) -> Pattern | None:
    """The last pattern that names a module or the module `whole` that it is a part of; a type is that of the whole."""
    named = ((name, module),) if whole is None else ((name, whole[1]), whole)
    found = None
    for pattern in patterns:
        if any(matches(pattern, *each) for each in named):
            found = pattern
    return found


def show_pattern(pattern: Pattern) -> str:
    """A pattern as it stands in messages."""
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


def _suggestion(pattern: Pattern, modules: Mapping[str, nn.Module]) -> str:
    if isinstance(pattern, str):
        near = difflib.get_close_matches(pattern.removeprefix("re:"), [n for n in modules if n], n=3, cutoff=0.3)
        return (
            f"the nearest names are {', '.join(near)}" if near else f"names look like {', '.join(list(modules)[1:4])}"
        )
    types = sorted({type(module).__name__ for module in modules.values()})
    return f"the model has modules of type {', '.join(types)}"
