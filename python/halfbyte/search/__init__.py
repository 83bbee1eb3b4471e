"""Bit allocation: which module gets which scheme, by measured loss, exact bytes and measured latency."""

from halfbyte.search.allocation import Allocation
from halfbyte.search.front import Front
from halfbyte.search.latency import Latency
from halfbyte.search.measure import SensitivityWarning, measure_sensitivity
from halfbyte.search.table import SensitivityTable
from halfbyte.search.units import Entry, Unit

__all__ = [
    "Allocation",
    "Entry",
    "Front",
    "Latency",
    "SensitivityTable",
    "SensitivityWarning",
    "Unit",
    "measure_sensitivity",
]
