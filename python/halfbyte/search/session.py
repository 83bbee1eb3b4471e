"""The model at hand, measured in any mixture of schemes."""

from __future__ import annotations

import json

from torch import Tensor

from halfbyte.calibration import Forward
from halfbyte.search.bench import Choices, Workbench
from halfbyte.search.cache import MeasurementCache
from halfbyte.search.losses import LossMeter, Measurement, summarize


class Session:
    """The model at hand: what a table needs to measure more. It does not travel with a saved table."""

    def __init__(
        self, bench: Workbench, meter: LossMeter, cache: MeasurementCache, batch: object, forward: Forward | None
    ) -> None:
        self.bench, self.meter, self.cache, self.batch, self.forward = bench, meter, cache, batch, forward
        self._starts: dict[str, Tensor] = {}

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
