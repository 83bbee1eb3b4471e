"""Observers: what calibration measures of a tensor, and the qparams that follow.

All stream in constant memory, merge across batches and processes, and say how sure they are. `MinMax` and
`MovingAverageMinMax` keep ends only; `Histogram` keeps the distribution, of which `Percentile`, `MSE` and `Entropy` choose
a narrower range.
"""

from halfbyte.observers.histogram import MSE, Entropy, Histogram, Percentile
from halfbyte.observers.minmax import MinMax, MovingAverageMinMax
from halfbyte.observers.observer import ObservedRange, Observer

__all__ = [
    "MSE",
    "Entropy",
    "Histogram",
    "MinMax",
    "MovingAverageMinMax",
    "ObservedRange",
    "Observer",
    "Percentile",
]
