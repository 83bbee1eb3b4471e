"""Modules with several weights, seen as what they are made of: `nn.Linear` and `nn.Embedding` layers.

An LSTM or an attention block is registered here with a function that takes it *into parts*: a module that computes the same
from layers that hold the original's own weights. Everything else (plan, calibration, rounding, swapping, files, reports) then
knows those two layer types and no others: the parts of `encoder.lstm` are `encoder.lstm.ih_l0`, `encoder.lstm.hh_l0`, …
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from halfbyte.nn import (
    QuantizedBilinear,
    QuantizedEmbeddingBag,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedMultiheadAttention,
    QuantizedRNN,
    QuantizedRNNCell,
    as_linear,
)
from halfbyte.parametrized import resolved, why_resolved

M = TypeVar("M", bound=nn.Module)
_TYPE = "_halfbyte_type_before"  # plain attribute: copied and pickled with the module


@dataclass(frozen=True, slots=True)
class _Registration:
    take_apart: Callable[[nn.Module], nn.Module]
    forward: Callable[..., object]  # of the registered type: a subclass with another one computes something else
    why_float: Callable[[nn.Module], str | None]


# By type; types of packages that may not be installed by qualified name, with `forward` unknown until one is met.
_registered: dict[type[nn.Module], _Registration] = {}
_BY_NAME: dict[str, Callable[[nn.Module], nn.Module]] = {}


def register_module(
    module_type: type[M],
    take_apart: Callable[[M], nn.Module],
    *,
    why_float: Callable[[M], str | None] | None = None,
) -> None:
    """Teaches halfbyte to quantize modules of your own that own weights outside of `nn.Linear` and `nn.Embedding` layers.

    Modules made only of such layers need no registration.

    Args:
        module_type: The module's class. Subclasses count as long as they do not replace `forward`.
        take_apart: From a module, makes the one that takes its place: the same `forward`, computed by `nn.Linear` and
            `nn.Embedding` children that hold the module's own weights (`hb.nn.as_linear`, `hb.nn.as_embedding`). Other
            parameters may be handed over as they are. It may return such a layer itself. It must not read weights: they may be
            on the meta device. The children are replaced by quantized ones.
        why_float: From a module, says why it must stay as it is, or returns None. Called before `take_apart`.

    Raises:
        TypeError: `module_type` is not a module class.

    Example:
        >>> class Mixture(nn.Module):
        ...     def __init__(self, experts, in_features, out_features):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(experts, out_features, in_features))
        ...
        ...     def forward(self, x, expert):
        ...         return nn.functional.linear(x, self.weight[expert])
        >>> class QuantizedMixture(nn.Module):
        ...     def __init__(self, mixture):
        ...         super().__init__()
        ...         self.experts = nn.ModuleList(hb.nn.as_linear(weight) for weight in mixture.weight)
        ...
        ...     def forward(self, x, expert):
        ...         return self.experts[expert](x)
        >>> hb.register_module(Mixture, QuantizedMixture)
        >>> model = nn.ModuleDict({"mixture": Mixture(4, 64, 32)})
        >>> report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> model["mixture"](torch.randn(2, 64), 3).shape
        torch.Size([2, 32])
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type={module_type!r} is not a class of modules")
    reason = (lambda module: None) if why_float is None else why_float
    _registered[module_type] = _Registration(take_apart, module_type.forward, reason)  # type: ignore[arg-type]


def take_apart(module: nn.Module) -> nn.Module | str | None:
    """The module that takes the place of one with several weights; why there is none; None if it is of no registered type.

    Of a parametrized module, it is made from the weights that the parametrization computes; a parametrized layer becomes a
    plain one.
    """
    plain = resolved(module)
    if plain is not None:
        module = plain
    for module_type in type(module).__mro__:
        registration = _registered.get(module_type)
        if registration is None:
            by_name = _BY_NAME.get(f"{module_type.__module__}.{module_type.__qualname__}")
            if by_name is None:
                continue
            registration = _Registration(by_name, module_type.forward, lambda module: None)  # type: ignore[attr-defined]
        if type(module).forward is not registration.forward:
            return f"{type(module).__name__} has a forward of its own"
        reason = registration.why_float(module)
        if reason is not None:
            return reason
        taken = registration.take_apart(module)
        taken.__dict__[_TYPE] = type(module).__name__
        return taken
    return plain if isinstance(plain, nn.Linear | nn.Embedding) else None


def is_in_parts(module: nn.Module) -> bool:
    """Whether the module took the place of one with several weights."""
    return _TYPE in module.__dict__


def type_before(module: nn.Module) -> str:
    """Class name of the module whose place it took."""
    name = module.__dict__[_TYPE]
    assert isinstance(name, str)
    return name


def keep_type_before(old: nn.Module, new: nn.Module) -> None:
    """Hands the record on to the module that takes the place of `old`."""
    if is_in_parts(old):
        new.__dict__[_TYPE] = old.__dict__[_TYPE]


@dataclass(frozen=True, slots=True)
class ModelInParts:
    """A model as its plan sees it; the model itself is not changed.

    Attributes:
        modules: As `model.named_modules()`, registered modules and what is below them replaced by their parts.
        aliases: Further names of each module.
        wholes: Name to original of each module that is seen in parts.
        whole_of: Name of a part, or of a whole, to the name of its whole.
    """

    modules: dict[str, nn.Module]
    aliases: dict[str, list[str]]
    wholes: dict[str, nn.Module]
    whole_of: dict[str, str]

    @staticmethod
    def of(model: nn.Module, only: Collection[str] | None = None) -> ModelInParts:
        """Sees a model in parts.

        Args:
            model: Any module, also on the meta device.
            only: Names of the modules to take apart; None for all that can be.
        """
        view = ModelInParts({}, {}, {}, {})
        replacements: dict[int, nn.Module] = {}  # id of an original -> what takes its place
        first_names: dict[int, str] = {}

        # A stack and not a function that calls itself: its own cell would keep the view, and with it every float weight,
        # alive until the garbage collector comes by.
        pending: list[tuple[str, nn.Module, str | None]] = [("", model, None)]
        while pending:
            name, module, whole = pending.pop()
            place = module
            if name and whole is None and (only is None or name in only or id(module) in replacements):
                if id(module) not in replacements:
                    taken = take_apart(module)
                    if isinstance(taken, nn.Module):
                        replacements[id(module)] = taken
                        view.wholes[name] = module
                if id(module) in replacements:
                    place, whole = replacements[id(module)], name
            if id(place) in first_names:
                if first_names[id(place)] != name:
                    view.aliases[first_names[id(place)]].append(name)
            else:
                first_names[id(place)] = name
                view.modules[name] = place
                view.aliases[name] = []
                if whole is not None:
                    view.whole_of[name] = whole
            pending += reversed(
                [
                    (f"{name}.{child_name}" if name else child_name, child, whole)
                    for child_name, child in place._modules.items()
                    if child is not None
                ]
            )
        return view

    def named(self) -> dict[str, nn.Module]:
        """What patterns may name: every module, parts as the module they are a part of."""
        return {
            name: self.wholes[self.whole_of[name]] if name in self.whole_of else m for name, m in self.modules.items()
        }

    def whole(self, name: str) -> tuple[str, nn.Module] | None:
        """Name and original of the module that the module `name` is a part of."""
        whole = self.whole_of.get(name)
        return None if whole is None else (whole, self.wholes[whole])

    def parts(self, whole: str) -> Iterator[str]:
        """Names of the layers of a module seen in parts."""
        return (name for name, its_whole in self.whole_of.items() if its_whole == whole)


def _attention_reason(module: nn.Module) -> str | None:
    out_proj = module.out_proj
    assert isinstance(out_proj, nn.Module)
    return "the weight of its out_proj is parametrized" if why_resolved(out_proj) else None


def _embedding_bag_reason(module: nn.Module) -> str | None:
    return "max_norm rewrites its rows in forward" if module.max_norm is not None else None


def _linear_of_conv1d(module: nn.Module) -> nn.Module:
    """transformers' Conv1D (GPT-2 and its kin) is a Linear with a transposed weight."""
    return as_linear(module.weight.t(), module.bias)  # type: ignore[operator, arg-type]


register_module(nn.LSTM, QuantizedLSTM)
register_module(nn.GRU, QuantizedGRU)
register_module(nn.RNN, QuantizedRNN)
register_module(nn.LSTMCell, QuantizedLSTMCell)
register_module(nn.GRUCell, QuantizedGRUCell)
register_module(nn.RNNCell, QuantizedRNNCell)
register_module(nn.MultiheadAttention, QuantizedMultiheadAttention, why_float=_attention_reason)
register_module(nn.Bilinear, QuantizedBilinear)
register_module(nn.EmbeddingBag, QuantizedEmbeddingBag, why_float=_embedding_bag_reason)
_BY_NAME["transformers.pytorch_utils.Conv1D"] = _linear_of_conv1d
