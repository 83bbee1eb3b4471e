"""What halfbyte raises and warns.

Bad arguments raise `ValueError` or `TypeError` (or one of the subclasses here) before any work is done; the message says
what was given, what is allowed and how to fix it.
"""

from __future__ import annotations


class QuantizationError(ValueError):
    """A model, a recipe or calibration data that cannot be quantized as asked. The model is left as it was."""


class FallbackError(QuantizationError):
    """Something would be quantized otherwise than asked, and ``on_fallback="raise"`` forbids it."""


class FileFormatError(QuantizationError):
    """A file that is damaged, altered, newer than this version of halfbyte, or made for another model."""


class FallbackWarning(UserWarning):
    """Something was quantized otherwise than asked; the report lists it under ``fallbacks``."""


class VerificationError(RuntimeError):
    """`hb.verify` found a result that the integers of a model do not give: a bug of halfbyte, or of the machine."""
