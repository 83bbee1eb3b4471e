"""What a model that `prepare_qat_` prepared remembers: its plan, and the schedule by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from halfbyte.errors import QuantizationError
from halfbyte.plan import Plan
from halfbyte.qat.modules import QATModule
from halfbyte.qat.quantizer_base import recomputing

_STATE = "_halfbyte_qat"
_STEPS = "qat_steps"  # buffer of the model: training forwards so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What happens after how many training steps; a step is a call of the prepared model in training mode.

    Calls inside a checkpoint's recomputation do not count.

    Args:
        start: Train in floating point until then, observing ranges.
        freeze_observers: Ranges of static activations stay fixed from then on; None never.
        freeze_batchnorm: The same for the statistics of batch normalization.

    Example:
        >>> schedule = hb.qat.Schedule(start=100, freeze_observers=1000, freeze_batchnorm=800)
    """

    start: int = 0
    freeze_observers: int | None = None
    freeze_batchnorm: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "freeze_observers", "freeze_batchnorm"):
            value = getattr(self, name)
            if value is None and name != "start":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is not a number of steps; use an integer")
            if value < 0:
                raise ValueError(f"{name}={value} is negative; use 0 or a later step")


@dataclass(slots=True, kw_only=True)
class QATState:
    """Kept by the model.

    Attributes:
        plan: What `convert_` will do.
        batch_norms: Name of a layer to that of the batch normalization folded into it.
        schedule: By step, or None.
    """

    plan: Plan
    batch_norms: dict[str, str]
    schedule: Schedule | None = None


def is_qat(model: nn.Module) -> bool:
    """Whether `prepare_qat_` was called and `convert_` was not."""
    return _STATE in model.__dict__


def qat_state(model: nn.Module) -> QATState:
    """What a prepared model remembers.

    Raises:
        QuantizationError: it is not prepared.
    """
    state = model.__dict__.get(_STATE)
    if not isinstance(state, QATState):
        raise QuantizationError("the model is not prepared for training; call hb.prepare_qat_(model, recipe) first")
    return state


def remember(model: nn.Module, state: QATState) -> None:
    """Makes the model a prepared one."""
    model.__dict__[_STATE] = state
    if state.schedule is not None:
        model.register_buffer(_STEPS, torch.zeros((), dtype=torch.int64))
        model.register_forward_pre_hook(count_step)


def forget(model: nn.Module) -> None:
    """Takes back what `remember` did."""
    del model.__dict__[_STATE]
    model._buffers.pop(_STEPS, None)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is count_step]:
        del model._forward_pre_hooks[key]


def qat_modules(model: nn.Module) -> Iterator[QATModule]:
    """The layers that train with fake quantization; those of any module, prepared or part of a prepared one.

    Raises:
        QuantizationError: there are none.
    """
    modules = [module for module in model.modules() if isinstance(module, QATModule)]
    if not modules:
        raise QuantizationError("there is no layer in it that hb.prepare_qat_ prepared")
    return iter(modules)


def count_step(model: nn.Module, args: tuple[object, ...]) -> None:
    """Forward pre-hook of a prepared model with a schedule."""
    if torch.compiler.is_exporting():
        return  # a graph for use elsewhere: no step
    _count_step(model)


@partial(
    torch.compiler.disable,
    reason=(
        "a hb.qat.Schedule counts steps in Python: compile without fullgraph=True, or without a schedule and call "
        "hb.qat.set_enabled, freeze_observers and freeze_batchnorm yourself"
    ),
)
def _count_step(model: nn.Module) -> None:
    """Switches what is due at this step; inside a compiled model too, which is compiled anew where a switch has changed."""
    if not model.training or recomputing():
        return
    schedule = qat_state(model).schedule
    steps = model._buffers[_STEPS]
    assert schedule is not None and steps is not None
    step = int(steps)
    from halfbyte.qat.control import freeze_batchnorm, freeze_observers, set_enabled

    if step == schedule.start and step:
        set_enabled(model)
    if step == schedule.freeze_observers:
        freeze_observers(model)
    if step == schedule.freeze_batchnorm:
        freeze_batchnorm(model)
    steps.add_(1)
