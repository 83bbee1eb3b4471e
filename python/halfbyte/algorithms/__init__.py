"""Algorithms that turn float weights into better integers. A *rounding* chooses the integers of each layer."""

from halfbyte.algorithms.rounding import MSE, RTN, Rounding, default_rounding

__all__ = ["MSE", "RTN", "Rounding", "default_rounding"]
