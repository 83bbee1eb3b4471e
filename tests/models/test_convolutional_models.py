"""Real image classifiers with quantized convolutions: top-1 against float, and the contract on their own data."""

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.models import vision

import halfbyte as hb

SCHEMES = {"int8_dynamic": hb.int8_dynamic(), "int8_weight_only": hb.int8_weight_only()}
# Images that are evaluated, least agreement of top-1 with float. Of 1,000 classes and 60 images, four are nearly tied.
CASES = {"Tiny-Darknet": (60, 0.9), "MobileNetV1 0.25": (200, 0.95), "ResNet-20": (300, 0.95), "ResNet-8": (300, 0.95)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_top1_stays(shared_data: Path, name: str, scheme: str) -> None:
    images, agreement = CASES[name]
    data = vision.load_data(shared_data, name, images=images)
    model = vision.load_float(shared_data, name)
    expected = vision.logits(model, data.images).argmax(1)
    quantized = copy.deepcopy(model)
    report = hb.quantize_(quantized, SCHEMES[scheme], progress=False)
    assert report.bytes_after < report.bytes_before / 2
    top1 = vision.logits(quantized, data.images).argmax(1)
    assert (top1 == expected).float().mean() >= agreement
    before, after = ((t == data.labels).float().mean() for t in (expected, top1))
    assert after >= before - 0.05  # three of 60 images


@pytest.mark.parametrize("name", ["MobileNetV1 0.25", "ResNet-8"])
def test_verify_and_files(shared_data: Path, name: str) -> None:
    data = vision.load_data(shared_data, name, images=4)
    model = vision.load_float(shared_data, name)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    report = hb.verify(model, [data.images], max_rows=16)
    report.raise_if_failed()
    assert not report.never_ran
    with torch.no_grad():  # channels last is another way through the kernels
        last = model(data.images.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, model(data.images))
