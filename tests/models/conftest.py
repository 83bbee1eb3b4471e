"""Makes the loaders of ``benchmarks/models`` importable as ``benchmarks.models``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
