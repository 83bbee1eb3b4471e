"""Makes the loaders of ``benchmarks/models`` importable as ``benchmarks.models``, and keeps these tests on one thread."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Test processes share the cores already; threads of small models would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
