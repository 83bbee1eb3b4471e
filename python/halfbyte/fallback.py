"""Fallbacks: every place where something is quantized otherwise than asked, as a record."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from halfbyte.errors import FallbackError, FallbackWarning

OnFallback = Literal["raise", "warn", "allow"]
Kind = Literal["activation", "batch_norm", "bias", "damping", "group_size", "scale_dtype", "tied_weights", "transform"]


@dataclass(frozen=True, slots=True)
class Fallback:
    """One departure from what was asked.

    Attributes:
        module: Qualified name of the module.
        kind: `activation` (symmetric codes, where a layer has no others), `batch_norm` (not folded in training, or never run
            before it), `bias` (none to correct), `damping` (more of it, since a Hessian could not be factored), `group_size`
            (a smaller one that divides), `scale_dtype` (float32, since 16 bits would not hold the scales), `tied_weights` (a
            shared table stored twice, since its users got different formats) or `transform` (one that found no place, or was
            undone since it changed the float model).
        message: What was asked, what is done instead, and why.
    """

    module: str
    kind: Kind
    message: str

    def to_dict(self) -> dict[str, str]:
        """A JSON-able description."""
        return {"module": self.module, "kind": self.kind, "message": self.message}


def announce(fallbacks: Iterable[Fallback], on_fallback: OnFallback) -> None:
    """Raises, warns once, or does nothing.

    Raises:
        FallbackError: with all fallbacks, if `on_fallback` is "raise" and there are any.
    """
    if on_fallback not in ("raise", "warn", "allow"):
        raise ValueError(f"on_fallback={on_fallback!r} is unknown; use 'raise', 'warn' or 'allow'")
    lines = [f"{f.module}: {f.message}" for f in fallbacks]
    if not lines or on_fallback == "allow":
        return
    if on_fallback == "raise":
        raise FallbackError(
            "on_fallback='raise' and the model cannot be quantized exactly as asked:\n" + "\n".join(lines)
        )
    shown = lines[:3] + ([f"... and {len(lines) - 3} more, see report.fallbacks"] if len(lines) > 3 else [])
    warnings.warn("not quantized exactly as asked: " + "; ".join(shown), FallbackWarning, stacklevel=3)
