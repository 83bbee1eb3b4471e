"""Every example in a docstring runs and prints what it says."""

import copy
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb

MODULES = ["halfbyte", *(info.name for info in pkgutil.walk_packages(hb.__path__, "halfbyte."))]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("._C")])
def test_examples_run(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    names = {"hb": hb, "torch": torch, "nn": nn, "copy": copy, "tmp_path": tmp_path}
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in finder.find(module, name, globs={**vars(module), **names}):
        runner.run(test)
    assert runner.failures == 0
