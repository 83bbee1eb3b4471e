"""The loaders reproduce the published float32 figures: quantized figures are relative to the right thing."""

from pathlib import Path

import pytest
from benchmarks.models import llama, minilm, vision


@pytest.mark.parametrize(
    ("name", "rows", "tokens", "perplexity"),
    [("novels5M", 200, 51_000, 21.24), ("stories260K", 100, 21_720, 5.958)],
)
def test_language_model_has_its_published_perplexity(
    shared_data: Path, name: str, rows: int, tokens: int, perplexity: float
) -> None:
    text = llama.load_text(shared_data, name, rows=rows)
    result = llama.evaluate(llama.load_float(shared_data, name), text.evaluation)
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(perplexity, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("novels5M", "It was a cold evening, and the\nshort cheeks of the forests of the school."),
        ("stories260K", "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."),
    ],
)
def test_greedy_text_is_the_published_one(shared_data: Path, name: str, expected: str) -> None:
    text = llama.load_text(shared_data, name, rows=1, calibration_rows=1)
    assert llama.greedy(llama.load_float(shared_data, name), text).startswith(expected)


def test_stories_tokenizer_round_trips(shared_data: Path) -> None:
    story = (shared_data / "text" / "tinystories_calib.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")[0]
    text = llama.load_text(shared_data, "stories260K", rows=1, calibration_rows=1)
    decoded = text.decode(text.calibration[0].tolist())
    assert story.startswith(decoded)
    assert len(decoded) > 200


def test_sentence_encoder_has_its_published_correlation(shared_data: Path) -> None:
    pairs = minilm.load_pairs(shared_data)
    spearman, pearson = minilm.score(minilm.embed(minilm.load_float(shared_data), pairs), pairs)
    assert spearman == pytest.approx(0.77148, abs=2e-5)
    assert pearson == pytest.approx(0.83627, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "images", "top1"),
    [("MobileNetV1 0.25", 800, 0.85625), ("ResNet-20", 1000, None), ("ResNet-8", 1000, None)],
)
def test_image_classifiers_have_their_published_accuracy(
    shared_data: Path, name: str, images: int, top1: float | None
) -> None:
    data = vision.load_data(shared_data, name, images=images)
    answers = vision.logits(vision.load_float(shared_data, name), data.images).argmax(1)
    found = (answers == data.labels).float().mean().item()
    if top1 is None:  # published for all 5,000
        published, deviation = {"ResNet-20": (0.8102, 0.0124), "ResNet-8": (0.7644, 0.0134)}[name]
        assert abs(found - published) < 2 * deviation
    else:
        assert found == pytest.approx(top1, abs=1e-6)
