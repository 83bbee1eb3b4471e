"""Static activations: the ranges of layers' inputs, observed while calibration data runs, and the qparams that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.errors import QuantizationError
from halfbyte.observers import MSE, Observer
from halfbyte.ops.checks import FLOAT_DTYPES
from halfbyte.schemes import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRange:
    """What calibration found of a layer's inputs.

    Attributes:
        low, high: The range that the codes cover, zero included.
        band: How far an end has moved since a quarter of the batches had been seen; see `hb.observers.ObservedRange`.
        samples, batches: Elements and batches seen.
        converged: Whether more data is unlikely to change the range.
        observer: Name of the observer.
    """

    low: float
    high: float
    band: float
    samples: int
    batches: int
    converged: bool
    observer: str

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class InputObserver:
    """Observes the first argument of a layer; registered as a forward pre-hook.

    Args:
        name: Qualified name of the layer.
        scheme: Its scheme, with static activations.
    """

    def __init__(self, name: str, scheme: Scheme) -> None:
        activation = scheme.activation
        assert activation is not None and scheme.static
        self._name = name
        prototype = MSE() if scheme.observer is None else scheme.observer
        self.observer: Observer = prototype.fresh(
            bits=activation.bits, symmetric=activation.symmetric, name=f"the input of {name}"
        )

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The hook.

        Raises:
            QuantizationError: the input is not in floating point, or holds NaN or inf.
        """
        if not args or not isinstance(args[0], Tensor):
            return
        if args[0].dtype not in FLOAT_DTYPES:
            raise QuantizationError(
                f"{self._name}: its input is {args[0].dtype}; static INT8 layers take float32, bfloat16 or float16: "
                "convert the input, or leave the layer out with an override"
            )
        self.observer.update(args[0])

    def begin_share(self) -> None:
        """Sets aside what was seen, until `end_share`."""
        self._aside = self.observer
        self.observer = self.observer.fresh(
            bits=self.observer.bits, symmetric=self.observer.symmetric, name=self.observer.name
        )

    def abandon_share(self) -> None:
        """Forgets what was seen since `begin_share`."""
        self.observer = self._aside

    def end_share(self) -> None:
        """Adds what all processes of the default group have seen since to what was set aside."""
        self.observer.all_reduce()
        self._aside.merge(self.observer)
        self.observer = self._aside

    def found(self) -> ActivationRange:
        """The range, for reports.

        Raises:
            QuantizationError: the layer never ran.
        """
        self._check_ran()
        seen = self.observer.range()
        return ActivationRange(
            low=min(float(seen.low), 0.0),
            high=max(float(seen.high), 0.0),
            band=float(torch.maximum(seen.low_band, seen.high_band)),
            samples=seen.samples,
            batches=seen.batches,
            converged=seen.converged,
            observer=type(self.observer).__name__,
        )

    def qparams(self) -> tuple[Tensor, Tensor]:
        """`act_scale` and `act_zero_point` of the layer; the zero point is that of signed codes.

        Raises:
            QuantizationError: the layer never ran.
        """
        self._check_ran()
        scale, zero_point = self.observer.qparams()
        return scale, zero_point if self.observer.symmetric else zero_point - (1 << (self.observer.bits - 1))

    def _check_ran(self) -> None:
        if not self.observer.batches:
            raise QuantizationError(
                f"{self._name} never ran on the data: give data that reaches it, or leave it out with "
                f"hb.Recipe(..., overrides={{{self._name!r}: None}})"
            )
