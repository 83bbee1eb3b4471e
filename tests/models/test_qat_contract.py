"""Whole models on real data: trained a few steps, what they evaluate to is what they convert to, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from benchmarks.models import charrnn, llama, vision
from sklearn.datasets import load_digits
from torch import Tensor, nn

import halfbyte as hb

STATIC = hb.int8_static()
W4A4 = hb.Recipe(
    default=hb.int_static(4, 4), overrides={"conv1": STATIC, "linear": STATIC}
)  # first and last layer in 8 bits, as published


def train_and_convert(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    batches: Sequence[Tensor],
    run: Callable[[], Tensor],
    *,
    lr: float,
) -> tuple[Tensor, hb.Report]:
    """Outputs in evaluation mode, once they are found equal to those after conversion."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < max(losses[0], 1e-3)
    model.eval()
    with torch.no_grad():
        expected = run()
        report = hb.convert_(model, progress=False)
        found = run()
    assert torch.equal(found, expected)
    return found, report


def agreement(a: Tensor, b: Tensor) -> float:
    return (a.argmax(-1) == b.argmax(-1)).float().mean().item()


def distance(model: nn.Module, x: Tensor, teacher: Tensor) -> Tensor:
    """KL of a model's answers to those of another."""
    logits = torch.log_softmax(model(x), -1).flatten(0, -2)
    return nn.functional.kl_div(
        logits, torch.log_softmax(teacher, -1).flatten(0, -2), log_target=True, reduction="batchmean"
    )


@pytest.mark.parametrize(
    ("recipe", "methods", "close"),
    [(STATIC, {}, 0.97), (hb.int8_dynamic(), {}, 0.97), (W4A4, {"weights": "learned", "activations": "learned"}, 0.7)],
    ids=["int8_static", "int8_dynamic", "w4a4_learned"],
)
def test_resnet20(recipe: hb.Scheme | hb.Recipe, methods: dict[str, str], close: float, shared_data: Path) -> None:
    model = vision.load_float(shared_data, "ResNet-20").to(memory_format=torch.channels_last)
    data = vision.load_data(shared_data, "ResNet-20", calibration=64, images=100)
    train, test = (x.to(memory_format=torch.channels_last) for x in (data.calibration, data.images))
    with torch.no_grad():
        teacher, expected = model(train), model(test)
    hb.prepare_qat_(model, recipe, train[:2], on_fallback="allow", **methods)
    hb.qat.freeze_batchnorm(model)
    loss = lambda x: distance(model, x, teacher)  # noqa: E731
    found, report = train_and_convert(model, loss, [train] * 5, lambda: model(test), lr=1e-3)
    assert agreement(found, expected) >= close
    assert sum("folded into" in module.plan.note for module in report.modules) == 19


@pytest.mark.parametrize(
    ("scheme", "methods"),
    [(hb.int8_dynamic(), {}), (hb.int4_weight_only(32), {"weights": "learned"}), (STATIC, {"activations": "learned"})],
    ids=["int8_dynamic", "int4_learned", "int8_static_learned"],
)
def test_language_model(scheme: hb.Scheme, methods: dict[str, str], shared_data: Path) -> None:
    model = llama.load_float(shared_data, "novels5M")
    text = llama.load_text(shared_data, "novels5M", rows=1, calibration_rows=1)
    row, test = text.calibration[0][None, :128], text.evaluation[0][None]
    with torch.no_grad():
        expected = model(input_ids=test, use_cache=False).logits
    hb.prepare_qat_(model, scheme, **methods)
    loss = lambda x: model(input_ids=x, labels=x, use_cache=False).loss  # noqa: E731
    run = lambda: model(input_ids=test, use_cache=False).logits  # noqa: E731
    found, _ = train_and_convert(model, loss, [row] * 3, run, lr=1e-3)
    assert agreement(found, expected) > 0.8
    assert model.model.embed_tokens.qweight is model.lm_head.qweight


@pytest.mark.parametrize("scheme", [STATIC, hb.int8_dynamic(), hb.int4_weight_only(32)], ids=str)
def test_character_lstm(scheme: hb.Scheme, shared_data: Path) -> None:
    model = charrnn.load_float(shared_data, "charrnn_shakespeare")
    rows = charrnn.load_rows(shared_data, "charrnn_shakespeare", 8)
    train, test = rows[:4, :33], rows[4:, :64]
    with torch.no_grad():
        expected = model(test)
    hb.prepare_qat_(model, scheme)
    loss = lambda x: nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())  # noqa: E731
    found, _ = train_and_convert(model, loss, [train] * 5, lambda: model(test), lr=0.02)
    assert agreement(found, expected) > 0.7  # of 65 characters; training moves the answers too


@pytest.mark.parametrize(("scheme", "accuracy"), [(STATIC, 0.93), (hb.int_static(4, 4), 0.9)], ids=["int8", "w4a4"])
def test_digits_classifier_trains_from_scratch(scheme: hb.Scheme, accuracy: float) -> None:
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    with pytest.warns(hb.FallbackWarning, match="never ran: scales of weights are trained as 'lsq' does"):
        hb.prepare_qat_(model, scheme, images[:2], weights="learned", activations="learned")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(6):
        for x, label in zip(images[:1200].split(100), labels[:1200].split(100), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), label).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(images[1200:])
        hb.convert_(model, progress=False)
        found = model(images[1200:])
    assert torch.equal(found, expected)
    assert (found.argmax(1) == labels[1200:]).float().mean() > accuracy
