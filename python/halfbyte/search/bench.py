"""A workbench: one model in which every unit can be switched between its candidates, the user's model left alone.

Every scheme is applied to a copy of the modules (not of the weights), by the same `quantize_` that will be used in the end,
and its quantized modules are kept. Any mixture of them is then a matter of putting modules in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from halfbyte.algorithms import Rounding
from halfbyte.calibration import Forward
from halfbyte.errors import QuantizationError
from halfbyte.progress import track
from halfbyte.recipe import Recipe
from halfbyte.schemes import Scheme
from halfbyte.search.units import Unit
from halfbyte.targets import disable_fast_paths
from halfbyte.workflow import quantize_

Choices = Mapping[str, str]  # unit name -> key of a candidate
FLOAT = "float"


def weight_bits(scheme: Scheme | None) -> int:
    """Width of a weight in a scheme; floating point counts as 32."""
    return 32 if scheme is None else scheme.weight.bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One scheme of one unit.

    Attributes:
        scheme: The scheme, or None for floating point.
        bytes: Of the unit's parameters and buffers as saved.
        modules: Module name to what takes its place.
    """

    scheme: Scheme | None
    bytes: int
    modules: Mapping[str, nn.Module] = field(repr=False)


def short_labels(keys: Sequence[str]) -> dict[str, str]:
    """Key to as many of its first words as tell it apart, for tables and plots.

    Example:
        >>> short_labels(["int8 per channel", "int4 group 32", "int4 group 64"])
        {'int8 per channel': 'int8', 'int4 group 32': 'int4 group 32', 'int4 group 64': 'int4 group 64'}
    """

    def shortest(key: str) -> str:
        words = key.split()
        for count in range(1, len(words)):
            start = words[:count]
            if all(other == key or other.split()[:count] != start for other in keys):
                return " ".join(start).rstrip(",")
        return key

    return {key: shortest(key) for key in keys}


class Workbench:
    """A model whose units can be switched between candidates.

    Args:
        model: The float model; its modules are copied, its tensors are shared and never written.
        units: What can be switched.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self.units = tuple(units)
        self.model = module_copy(model).eval()
        self._names = _all_names(self.model, [name for unit in units for name in unit.modules])
        self.candidates: dict[str, dict[str, Candidate]] = {}
        self.rest_bytes = _tensor_bytes([self.model])
        for unit in self.units:
            modules = {name: self.model.get_submodule(name) for name in unit.modules}
            size = _tensor_bytes(modules.values())
            self.candidates[unit.name] = {FLOAT: Candidate(scheme=None, bytes=size, modules=modules)}
            self.rest_bytes -= size
        self._current: dict[str, str] = {unit.name: FLOAT for unit in self.units}

    def add_scheme(
        self,
        key: str,
        scheme: Scheme,
        *,
        data: Sequence[object] | None = None,
        forward: Forward | None = None,
        algorithms: Sequence[Rounding] = (),
    ) -> None:
        """Quantizes every unit with `scheme` and keeps the modules as candidates `key`, where the scheme applies."""
        self.apply({})
        quantized = module_copy(self.model)
        overrides = {name: scheme for unit in self.units for name in unit.modules}
        report = quantize_(
            quantized,
            Recipe(default=None, overrides=overrides),  # type: ignore[arg-type]
            data=data,
            algorithms=algorithms,
            progress=False,
            on_fallback="allow",
            forward=forward,
        )
        done = {row.plan.part_of or row.name for row in report.modules if row.plan.scheme is not None}
        for unit in self.units:
            if not done.issuperset(unit.modules):
                continue
            modules = {name: quantized.get_submodule(name).eval() for name in unit.modules}
            size = _tensor_bytes(modules.values())
            self.candidates[unit.name][key] = Candidate(scheme=scheme, bytes=size, modules=modules)

    def apply(self, choices: Choices) -> nn.Module:
        """Puts the chosen candidates in place; units that `choices` leaves out are in floating point.

        Returns:
            The model, in evaluation mode.
        """
        for unit in self.units:
            key = choices.get(unit.name, FLOAT)
            if self._current[unit.name] == key:
                continue
            for name, module in self.candidates[unit.name][key].modules.items():
                for each in self._names[name]:
                    parent, _, child = each.rpartition(".")
                    self.model.get_submodule(parent)._modules[child] = module
            self._current[unit.name] = key
        disable_fast_paths(self.model)
        return self.model

    @property
    def float_modules(self) -> dict[str, nn.Module]:
        """Name to float module, of all units."""
        return {
            name: module for unit in self.units for name, module in self.candidates[unit.name][FLOAT].modules.items()
        }

    def bytes_of(self, choices: Choices) -> int:
        """Bytes of the whole model under `choices`, as saved, less the header of the file."""
        return self.rest_bytes + sum(
            self.candidates[unit.name][choices.get(unit.name, FLOAT)].bytes for unit in self.units
        )


def build_workbench(
    model: nn.Module,
    units: Sequence[Unit],
    schemes: Mapping[str, Scheme],
    *,
    data: Sequence[object] | None,
    forward: Forward | None,
    algorithms: Sequence[Rounding],
    progress: bool,
) -> Workbench:
    """A workbench with candidates of every scheme.

    Raises:
        QuantizationError: a scheme applies to no unit.
    """
    bench = Workbench(model, units)
    for key, scheme in track(schemes.items(), "quantizing candidates", total=len(schemes), enabled=progress):
        bench.add_scheme(key, scheme, data=data, forward=forward, algorithms=algorithms)
        if not any(key in candidates for candidates in bench.candidates.values()):
            raise QuantizationError(f"scheme {key} applies to no module of the model; leave it out")
    return bench


def module_copy(model: nn.Module) -> nn.Module:
    """The model's modules anew, around the same tensors: switching modules of the copy leaves the model alone."""
    shared: dict[int, object] = {}
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        shared.update({id(t): t for t in tensors if isinstance(t, Tensor)})
    return copy.deepcopy(model, shared)


def _all_names(model: nn.Module, wanted: Sequence[str]) -> dict[str, list[str]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {name: [other for other, module in modules.items() if module is modules[name]] for name in wanted}


def _tensor_bytes(modules: object) -> int:
    tensors: dict[int, int] = {}
    for module in modules:  # type: ignore[attr-defined]
        for tensor in (*module.parameters(), *module.buffers()):
            tensors[tensor.data_ptr() if tensor.numel() else id(tensor)] = tensor.nbytes
    return sum(tensors.values())
