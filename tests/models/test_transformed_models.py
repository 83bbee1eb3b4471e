"""Transforms on real models: planted outlier channels of a Llama, a rotated stream, the places of a sentence encoder."""

import copy
from pathlib import Path

import pytest
import torch
from benchmarks.models import llama, minilm
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import halfbyte as hb

Algorithms = tuple[hb.algorithms.Transform | hb.algorithms.Rounding, ...]


class Subject:
    """stories260K, with and without planted outliers: they compute the same."""

    def __init__(self, root: Path) -> None:
        self.text = llama.load_text(root, "stories260K", rows=16, calibration_rows=8)
        self.calibration = [row[None] for row in self.text.calibration]
        self.model = llama.load_float(root, "stories260K")
        self.planted = copy.deepcopy(self.model)
        llama.plant_outliers(self.planted, 30.0)
        self.reference = llama.log_probs(self.model, self.text.evaluation)

    def distance(self, original: LlamaForCausalLM, scheme: hb.Scheme, algorithms: Algorithms) -> llama.Distance:
        model = copy.deepcopy(original)
        hb.quantize_(model, scheme, data=self.calibration, algorithms=algorithms, progress=False, on_fallback="allow")
        return llama.evaluate(model, self.text.evaluation, self.reference)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Subject:
    return Subject(shared_data)


def test_planted_outliers_leave_the_float_model_alone(stories: Subject) -> None:
    assert llama.evaluate(stories.planted, stories.text.evaluation, stories.reference).kl < 1e-6


@pytest.mark.parametrize("transform", [hb.SmoothQuant(), hb.AWQ()], ids=["SmoothQuant", "AWQ"])
def test_int8_recovers_from_planted_outliers(stories: Subject, transform: hb.algorithms.Transform) -> None:
    collapsed = stories.distance(stories.planted, hb.int8_dynamic(), ())
    recovered = stories.distance(stories.planted, hb.int8_dynamic(), (transform,))
    assert collapsed.kl > 20 * recovered.kl
    assert abs(recovered.perplexity_change) < 0.01


@pytest.mark.parametrize("transform", [hb.SmoothQuant(), hb.AWQ()], ids=["SmoothQuant", "AWQ"])
def test_4_bits_lose_no_more_than_without_outliers(stories: Subject, transform: hb.algorithms.Transform) -> None:
    scheme = hb.int4_int8_dynamic(32)
    clean = stories.distance(stories.model, scheme, ())
    collapsed = stories.distance(stories.planted, scheme, ())
    recovered = stories.distance(stories.planted, scheme, (transform, hb.GPTQ()))
    assert collapsed.perplexity_change > 0.2
    assert recovered.kl < clean.kl


def test_a_stream_is_rotated_once_the_head_has_its_own_weight(stories: Subject) -> None:
    model = copy.deepcopy(stories.planted)
    rotation = hb.algorithms.Rotation()
    with pytest.raises(hb.QuantizationError, match="shares its weight"):
        hb.quantize_(model, hb.int8_dynamic(), data=stories.calibration, algorithms=[rotation], progress=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    before = model.lm_head.weight.clone()
    report = hb.quantize_(model, hb.int8_dynamic(), data=stories.calibration, algorithms=[rotation], progress=False)
    (record,) = report.transforms
    assert not record.reason and record.change is not None and record.change < 1e-5
    assert len(record.consumers) == 26
    assert not torch.allclose(model.lm_head.dequantize(), before, atol=0.1)
    assert abs(llama.evaluate(model, stories.text.evaluation, stories.reference).perplexity_change) < 0.01


def test_values_fold_in_an_encoder_whose_norms_follow_the_residual(shared_data: Path) -> None:
    original = minilm.load_float(shared_data)
    batches: list[dict[str, Tensor]] = [inputs for _, inputs in minilm.batches(minilm.load_pairs(shared_data, 40))]
    model, plain = copy.deepcopy(original), copy.deepcopy(original)
    report = hb.quantize_(
        model, hb.int8_dynamic(), data=batches, algorithms=[hb.SmoothQuant(alpha=0.5)], progress=False
    )
    hb.quantize_(plain, hb.int8_dynamic(), progress=False)
    done = {record.producer: record.consumers for record in report.transforms if not record.reason}
    layers = [f"encoder.layer.{index}.attention." for index in range(6)]
    assert done == {layer + "self.value": (layer + "output.dense",) for layer in layers}
    reasons = {record.producer: record.reason for record in report.transforms if record.reason}
    assert "does not scale with it" in reasons["encoder.layer.0.attention.output.LayerNorm"]
    with torch.no_grad():
        ours, unsmoothed, theirs = (m(**batches[-1]).last_hidden_state for m in (model, plain, original))
    assert (ours - theirs).norm() < 1.05 * (unsmoothed - theirs).norm()
