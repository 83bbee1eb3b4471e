"""The model at hand, measured in any mixture of schemes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from torch import Tensor

from halfbyte.calibration import Forward
from halfbyte.errors import QuantizationError
from halfbyte.search.bench import Choices, Workbench
from halfbyte.search.cache import MeasurementCache
from halfbyte.search.losses import LossMeter, Measurement, summarize
from halfbyte.search.proxies import Scores, proxy_scores

_TRACED = 4  # batches that traces are estimated on
_TRACE = "trace"  # where a cache has a configuration that a measurement started from


class Session:
    """The model at hand: what a table needs to measure more. It does not travel with a saved table."""

    def __init__(
        self,
        bench: Workbench,
        meter: LossMeter,
        cache: MeasurementCache,
        batches: Sequence[object],
        forward: Forward | None,
        *,
        traced: bool,
    ) -> None:
        self.bench, self.meter, self.cache, self.batches, self.forward = bench, meter, cache, batches, forward
        self._starts: dict[str, Tensor] = {}
        self._traced = traced
        self._traces: Scores | None = None

    def measure(self, choices: Choices, start: Choices | None = None) -> Measurement:
        """The loss of a configuration; its margin is that of the difference to the configuration `start`."""
        key = "" if start is None else json.dumps(sorted(start.items()))
        known = self.cache.get(choices, key)
        if known is not None:
            return known
        values = self.meter.values(self.bench.apply(choices))
        if start is not None and key not in self._starts:
            self._starts[key] = self.meter.values(self.bench.apply(start))
        measurement = summarize(values, None if start is None else self._starts[key])
        self.cache.put(choices, key, measurement)
        return measurement

    def traces(self) -> Scores | None:
        """HAWQ-V2's estimate of the losses, a second opinion to start corrections from.

        It sees curvature at the float model only, but of all weights of a module together. None where it does not apply:
        losses other than "kl", modules without one weight, operations without a second derivative.
        """
        if not self._traced:
            return None
        if self._traces is None:
            self._traces = self._known_traces()
        if self._traces is None:
            try:
                self._traces = proxy_scores(
                    self.bench, self.batches[:_TRACED], "trace", forward=self.forward, progress=False
                )
            except (QuantizationError, NotImplementedError, RuntimeError):
                self._traced = False
                return None
            for unit, row in self._traces.items():
                for key, score in row.items():
                    self.cache.put({unit: key}, _TRACE, Measurement(score, 0.0))
        return self._traces

    def _known_traces(self) -> Scores | None:
        found: Scores = {}
        for unit, candidates in self.bench.candidates.items():
            for key in candidates:
                known = self.cache.get({unit: key}, _TRACE)
                if known is None:
                    return None
                found.setdefault(unit, {})[key] = known.loss
        return found
