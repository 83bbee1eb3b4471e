"""Switches of a prepared model, and its trained scales."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from halfbyte.qat.batchnorm import QATBatchNorm
from halfbyte.qat.state import qat_modules
from halfbyte.qat.switches import Switches


def set_enabled(
    model: nn.Module, enabled: bool = True, *, weights: bool | None = None, activations: bool | None = None
) -> None:
    """Turns fake quantization on or off; ranges are observed either way.

    Args:
        model: A prepared model or any part of one.
        enabled: For weights and activations both.
        weights, activations: For one of the two, in place of `enabled`.

    Raises:
        QuantizationError: nothing in it is prepared.
    """
    for module in qat_modules(model):
        module.switch("weights", enabled if weights is None else weights)
        module.switch("activations", enabled if activations is None else activations)


def freeze_observers(model: nn.Module, frozen: bool = True) -> None:
    """Fixes the ranges of static activations, or lets them move again; trained scales are not concerned.

    Args:
        model: A prepared model or any part of one.
        frozen: False undoes it.

    Raises:
        QuantizationError: nothing in it is prepared.
    """
    for module in qat_modules(model):
        quantizer = module.input_quantizer
        if isinstance(quantizer, Switches):
            quantizer.switch("observing", not frozen)


def freeze_batchnorm(model: nn.Module, frozen: bool = True) -> None:
    """Fixes the statistics of the batch normalization that layers fold, or lets them move again.

    From then on layers compute what they will compute when converted; gains and shifts train on. Call it some epochs before
    the end. Others, which were not folded, keep their mode: put them in evaluation mode yourself.

    Args:
        model: A prepared model or any part of one.
        frozen: False undoes it.

    Raises:
        QuantizationError: nothing in it is prepared.
    """
    qat_modules(model)
    for module in model.modules():
        if isinstance(module, QATBatchNorm):
            module.switch("frozen", frozen)


def scale_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained scales (and zero points, and clipping ranges) of all quantizers, for a parameter group of their own.

    Always in the same order, which an optimizer's `state_dict` relies on: keep them in a list.

    Args:
        model: A prepared model or any part of one.

    Raises:
        QuantizationError: nothing in it is prepared.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = hb.prepare_qat_(model, hb.int8_dynamic())
        >>> scales = list(hb.qat.scale_parameters(model))
        >>> weights = [p for p in model.parameters() if not any(p is scale for scale in scales)]
        >>> groups = [{"params": weights}, {"params": scales, "weight_decay": 0}]
    """
    seen: set[int] = set()
    for module in qat_modules(model):
        for quantizer in (module.weight_quantizer, module.input_quantizer):
            for parameter in () if quantizer is None else quantizer.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter
