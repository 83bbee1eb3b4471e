"""A bag-of-words classifier trained on real prose, with its table in 8, 4 and 2 bits."""

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.models import authors

import halfbyte as hb


@pytest.fixture(scope="module")
def subject(shared_data: Path) -> tuple[authors.AuthorClassifier, authors.Passages, torch.Tensor]:
    passages, training, testing = authors.load_passages(shared_data)
    return authors.train(passages, training), passages, testing


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.002), (4, 0.005), (2, 0.03)])
def test_authors_are_found_as_before(
    subject: tuple[authors.AuthorClassifier, authors.Passages, torch.Tensor], bits: int, bound: float, tmp_path: Path
) -> None:
    model, passages, testing = subject
    before = authors.accuracy(model, passages, testing)
    assert 0.85 < before < 0.999
    quantized = copy.deepcopy(model)
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"bag": hb.int_weight_only(bits)})
    report = hb.quantize_(quantized, recipe, progress=False)
    assert report.bytes_after < report.bytes_before * (bits + 2) / 32
    after = authors.accuracy(quantized, passages, testing)
    assert abs(after - before) < bound
    hb.save(quantized, tmp_path / "m.safetensors")
    loaded = hb.load_(authors.AuthorClassifier(), tmp_path / "m.safetensors").eval()
    assert authors.accuracy(loaded, passages, testing) == after
