"""Transforms: algorithms that change the float model so that it is easier to quantize, before any weight is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from halfbyte.calibration import Forward, run_batch
from halfbyte.edits import WeightEdits
from halfbyte.fallback import Fallback
from halfbyte.folds import Example, Fold, NoFold
from halfbyte.plan import Plan
from halfbyte.probing import find_folds
from halfbyte.processes import Processes

_EXAMPLE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformRecord:
    """What a transform did in one place, or why it did nothing there.

    Attributes:
        transform: Class name of the transform.
        producer: Qualified name of the module whose outputs were scaled.
        consumers: Names of the layers that make up for it.
        detail: What was chosen, such as `alpha=0.5`.
        change: Largest change of the float model's output on the example, relative to its largest value, after this and all
            before it; None where nothing was changed.
        reason: Why nothing was changed; empty where it was.
        failed: Whether that is less than was asked for, and so a fallback.
    """

    transform: str
    producer: str
    consumers: tuple[str, ...] = ()
    detail: str = ""
    change: float | None = None
    reason: str = ""
    failed: bool = False

    @property
    def fallback(self) -> Fallback | None:
        """The record of a failure."""
        return Fallback(self.producer, "transform", f"{self.transform}: {self.reason}") if self.failed else None

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"consumers": list(self.consumers)}


@dataclass(kw_only=True)
class TransformContext:
    """What a transform works with.

    Attributes:
        model: In evaluation mode, without gradients. Parameters are changed through `edits` only.
        plan: What each module will be quantized to.
        batches: Calibration data; empty if there is none.
        forward: `forward(model, batch)`, or None for batches that are arguments of the model.
        edits: Takes every change back if the call fails.
        progress: Show progress bars on stderr.
        processes: Each has some of the batches; all must come to the same changes. None if there is one.
    """

    model: nn.Module
    plan: Plan
    batches: Sequence[object]
    forward: Forward | None
    edits: WeightEdits
    progress: bool
    processes: Processes | None = None
    _folds: tuple[list[Fold], list[NoFold]] | None = field(default=None, init=False)

    def run(self, batch: object) -> object:
        """Runs the model on a batch."""
        return (self.forward or run_batch)(self.model, batch)

    @cached_property
    def example(self) -> Example:
        """The first row of the first batch, cut short where that can be done, with the outputs of the untouched model."""
        batch = self.batches[0] if self.processes is None else self.processes.gather(self.batches[0])[0]
        return _small_example(self.run, batch)

    def folds(self) -> tuple[list[Fold], list[NoFold]]:
        """Where scales can move, found once: changes that keep the float model as it is do not change where."""
        if self._folds is None:
            self._folds = find_folds(self.model, self.example.run)
        return self._folds


@runtime_checkable
class Transform(Protocol):
    """What `quantize_(..., algorithms=[...])` accepts to change the float model before its weights are rounded."""

    @property
    def needs_data(self) -> bool:
        """Whether calibration data must be given."""
        ...

    def check(self, plan: Plan) -> None:
        """Raises if there is nothing to gain with this plan; before any work."""
        ...

    def calibration_bytes(self, plan: Plan) -> int:
        """Memory that it takes beside the model."""
        ...

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        """Changes the model, so that it computes the same in floating point, and says where."""
        ...


def _small_example(run: Callable[[object], object], batch: object) -> Example:
    """One row of a batch, and of rows of tokens the first few; the batch itself if the model does not take that."""
    small = _cut(batch)
    try:
        return Example(lambda: run(small))
    except Exception:  # any: a custom forward may take only whole batches; what is wrong with those shows below
        return Example(lambda: run(batch))


def _cut(batch: object) -> object:
    """The first row of every tensor, if all have as many; of rows of tokens, the first few."""
    tensors = [t for t in _values(batch) if isinstance(t, Tensor)]
    rows = {t.shape[0] if t.dim() else None for t in tensors}
    if len(rows) != 1 or None in rows:
        return batch
    tokens = {t.shape[1:] for t in tensors}
    are_tokens = len(tokens) == 1 and all(t.dim() == 2 and not t.is_floating_point() for t in tensors)

    def cut(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return value[:1, :_EXAMPLE_TOKENS] if are_tokens else value[:1]

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(value) for value in batch) if isinstance(batch, tuple | list) else batch


def _values(batch: object) -> Sequence[object]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, tuple | list) else [batch]
