"""Modules whose weights are computed from other parameters: the same modules with the weights they compute.

`torch.nn.utils.parametrize` (weight_norm, spectral_norm, orthogonal and parametrizations of one's own) and the older
`torch.nn.utils.weight_norm` and `spectral_norm`, which set the weight before every forward.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# torch.nn.utils has functions of the same names.
_WeightNorm = importlib.import_module("torch.nn.utils.weight_norm").WeightNorm
_SpectralNorm = importlib.import_module("torch.nn.utils.spectral_norm").SpectralNorm


def why_resolved(module: nn.Module) -> str | None:
    """Which parametrizations of a module `resolved` computes once and for all; None if it has none."""
    names = [f"{type(hook).__name__} of {hook.name}" for hook in _norm_hooks(module)]
    if parametrize.is_parametrized(module):
        for name, of_one in cast(nn.ModuleDict, module.parametrizations).items():
            kinds = ", ".join(type(p).__name__.lstrip("_") for p in cast(parametrize.ParametrizationList, of_one))
            names.append(f"{kinds} of {name}")
    return f"{' and '.join(names)} resolved: computed once, as in evaluation mode" if names else None


def resolved(module: nn.Module) -> nn.Module | None:
    """A copy of a module that has the weights it computes as parameters; None if it has no parametrization.

    Other tensors and children are the module's own. The module itself stays as it is; it may be on the meta device.
    """
    if why_resolved(module) is None:
        return None
    weights: dict[str, Tensor] = {}
    computed_from: set[str] = set()
    with torch.no_grad():
        for hook in _norm_hooks(module):
            power_iteration = {"do_power_iteration": False} if isinstance(hook, _SpectralNorm) else {}
            weights[hook.name] = hook.compute_weight(module, **power_iteration)
            computed_from |= {f"{hook.name}_{suffix}" for suffix in ("g", "v", "u", "orig")}
        if parametrize.is_parametrized(module):
            weights |= _parametrized_weights(module)
            computed_from.add("parametrizations")
    plain: nn.Module = nn.Module.__new__(
        type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    )
    plain.__dict__ = {name: value for name, value in module.__dict__.items() if name not in weights}
    for kind in ("_parameters", "_buffers", "_modules"):
        members = getattr(module, kind)
        plain.__dict__[kind] = {name: member for name, member in members.items() if name not in computed_from}
    plain._forward_pre_hooks = without_norm_hooks(module)  # type: ignore[assignment]
    for name, weight in weights.items():
        plain._parameters[name] = nn.Parameter(weight.detach())
    return plain


def without_norm_hooks(module: nn.Module) -> OrderedDict[int, object]:
    """The forward pre-hooks of a module, those that compute a weight left out; the very dictionary if there are none."""
    hooks = cast("OrderedDict[int, object]", module._forward_pre_hooks)
    if not any(True for _ in _norm_hooks(module)):
        return hooks
    return OrderedDict((k, h) for k, h in hooks.items() if not isinstance(h, _WeightNorm | _SpectralNorm))


def _norm_hooks(module: nn.Module) -> Iterator[nn.utils.weight_norm.WeightNorm]:  # type: ignore[name-defined]
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WeightNorm | _SpectralNorm))


def _parametrized_weights(module: nn.Module) -> dict[str, Tensor]:
    """As in evaluation mode: spectral_norm changes its buffers in training mode."""
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    training = [m for m in parametrizations.modules() if m.training]
    for m in training:
        m.training = False
    try:
        return {name: parametrization() for name, parametrization in parametrizations.items()}
    finally:
        for m in training:
            m.training = True
