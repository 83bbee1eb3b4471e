"""From the sum of sensitivities to a loss: errors of many modules do not simply add up."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class LossCurve:
    """A rising curve through measured points, straight between them on logarithmic axes; proportional past the ends.

    Attributes:
        scores: Sums of sensitivities, ascending.
        losses: Measured losses there, ascending.
    """

    scores: tuple[float, ...]
    losses: tuple[float, ...]

    @staticmethod
    def through(points: Iterable[tuple[float, float]]) -> LossCurve:
        """The curve through points `(score, loss)`; those that would make it fall are left out."""
        kept: list[tuple[float, float]] = []
        for score, loss in sorted(points):
            if score > _TINY and loss > _TINY and (not kept or (score > kept[-1][0] and loss > kept[-1][1])):
                kept.append((score, loss))
        return LossCurve(tuple(s for s, _ in kept), tuple(loss for _, loss in kept))

    def __call__(self, score: float) -> float:
        """The loss at a score."""
        return _interpolate(score, self.scores, self.losses)

    def inverse(self, loss: float) -> float:
        """The score at a loss."""
        return _interpolate(loss, self.losses, self.scores)


def _interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    if not xs:
        return x
    if x <= xs[0]:
        return ys[0] * x / xs[0]
    if x >= xs[-1]:
        return ys[-1] * x / xs[-1]
    i = bisect.bisect_right(xs, x)
    t = math.log(x / xs[i - 1]) / math.log(xs[i] / xs[i - 1])
    return ys[i - 1] * math.exp(t * math.log(ys[i] / ys[i - 1]))
