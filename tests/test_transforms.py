"""Transforms inside `hb.quantize_`: planted outliers, records, refusals, and models that failed calls leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.algorithms import TransformContext, TransformRecord
from halfbyte.edits import WeightEdits
from halfbyte.errors import FallbackError, QuantizationError
from halfbyte.folds import Fold

WIDTH = 64


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A gated feed-forward with its norm and residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def make(*, outliers: float = 300.0) -> nn.Sequential:
    """Two blocks and a head; four channels of each norm are `outliers` times too large, and the layers make up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 10)).eval()
    with torch.no_grad():
        for block in list(model)[:2]:
            assert isinstance(block, Block)
            channels = torch.randperm(WIDTH)[:4]
            block.norm.weight[channels] *= outliers
            for layer in (block.up, block.gate):
                layer.weight[:, channels] /= outliers
    return model


def data(seed: int = 1, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, WIDTH, generator=generator) for _ in range(count)]


@torch.no_grad()
def error(quantized: nn.Module, original: nn.Module) -> float:
    x = torch.cat(data(2))
    return ((quantized(x) - original(x)).norm() / original(x).norm()).item()


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def quantize(model: nn.Module, *algorithms: object, scheme: hb.Scheme | None = None, **options: object) -> hb.Report:
    options = {"data": data(), "progress": False} | options
    return hb.quantize_(model, scheme or hb.int8_dynamic(), algorithms=algorithms, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.5, "search"])
@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_int8_dynamic(32)])
def test_smoothquant_recovers_planted_outliers(scheme: hb.Scheme, alpha: float | str) -> None:
    original = make()
    errors = []
    for algorithms in ((), (hb.SmoothQuant(alpha=alpha),)):
        model = copy.deepcopy(original)
        quantize(model, *algorithms, scheme=scheme)
        errors.append(error(model, original))
    clean, planted = make(outliers=1.0), make()
    quantize(clean, scheme=scheme)
    unharmed = error(clean, planted)
    assert errors[0] > 2 * unharmed
    assert errors[1] < 1.3 * unharmed


def test_the_report_says_what_was_scaled_and_what_that_changed() -> None:
    report = quantize(make(), hb.SmoothQuant(alpha=0.5))
    done = {r.producer: r for r in report.transforms if not r.reason}
    assert list(done) == ["0.norm", "0.up", "1.norm", "1.up"]
    assert done["0.norm"].consumers == ("0.gate", "0.up") or done["0.norm"].consumers == ("0.up", "0.gate")
    assert all(r.change is not None and r.change < 1e-5 and r.detail == "alpha=0.5" for r in done.values())
    assert "SmoothQuant changed 4 places" in str(report)
    assert report.to_dict()["transforms"][0]["transform"] == "SmoothQuant"  # type: ignore[index]
    assert not report.fallbacks


def test_a_transform_and_a_rounding_compose() -> None:
    original = make()
    errors = []
    for algorithms in ((hb.GPTQ(),), (hb.SmoothQuant(), hb.GPTQ())):
        model = copy.deepcopy(original)
        report = quantize(model, *algorithms, scheme=hb.int4_int8_dynamic(32), data=data(count=16))
        errors.append(error(model, original))
    assert {m.rounding for m in report.modules if m.plan.scheme is not None} == {"GPTQ"}
    assert errors[1] < 0.7 * errors[0]


def test_16_bit_weights_are_scaled_by_powers_of_two() -> None:
    model = make().to(torch.bfloat16)
    batches = [batch.to(torch.bfloat16) for batch in data()]
    report = quantize(model, hb.SmoothQuant(alpha=0.5), data=batches)
    done = [r for r in report.transforms if not r.reason]
    assert len(done) == 4
    assert all(r.change == 0.0 for r in done)


def test_nothing_to_fold_is_a_fallback() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    with pytest.warns(hb.FallbackWarning, match="SmoothQuant: no scale can move"):
        report = quantize(model, hb.SmoothQuant())
    assert [f.kind for f in report.fallbacks] == ["transform"]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FallbackError):
        quantize(model, hb.SmoothQuant(), on_fallback="raise")
    assert same(model, before)


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        ([hb.GPTQ(), hb.SmoothQuant()], "GPTQ chooses the integers and comes last"),
        ([hb.SmoothQuant(), hb.RTN(), hb.GPTQ()], "only one can choose the integers"),
    ],
)
def test_orders_that_make_no_sense_are_refused(algorithms: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(make(), *algorithms)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best", True])
def test_bad_alpha_is_refused(alpha: object) -> None:
    with pytest.raises(ValueError, match="alpha="):
        hb.SmoothQuant(alpha=alpha)  # type: ignore[arg-type]


def test_weight_only_schemes_are_refused() -> None:
    with pytest.raises(QuantizationError, match="AWQ"):
        quantize(make(), hb.SmoothQuant(), scheme=hb.int4_weight_only(32))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "SmoothQuant needs calibration data"),
        ([torch.randn(3, WIDTH)], "3 tokens of calibration data reached it; give at least 29 more"),
        ([*data(), torch.full((2, WIDTH), torch.nan)], "0.(up|gate): NaN or inf among its inputs"),
        ([torch.full((40, WIDTH), torch.nan)], "NaN or inf"),
        (iter([]), "data gave no batches"),
    ],
)
def test_bad_data_is_named_and_changes_nothing(batches: object, message: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=message):
        quantize(model, hb.SmoothQuant(), data=batches)
    assert same(model, before)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(QuantizationError, match="load the weights first"):
        quantize(make().to("meta"), hb.SmoothQuant())


def test_prepare_refuses_transforms() -> None:
    model = make()
    with pytest.raises(QuantizationError, match=r"use hb\.quantize_\("):
        hb.prepare_(model, hb.int8_dynamic(), algorithms=[hb.SmoothQuant()])
    assert not any(module._forward_pre_hooks for module in model.modules())


class Half:
    """A transform that changes a weight, then fails."""

    needs_data = False

    def check(self, plan: hb.Plan) -> None:
        pass

    def calibration_bytes(self, plan: hb.Plan) -> int:
        return 0

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        weight = context.model.get_submodule("0.up").weight
        assert isinstance(weight, nn.Parameter)
        context.edits.write(weight, weight * 2)
        raise KeyboardInterrupt


def test_an_interrupted_transform_leaves_the_model_as_it_was() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        quantize(model, Half())
    assert same(model, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_old_values_that_wait_in_a_file_come_back() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(3)]
    before = [layer.weight.detach().clone() for layer in layers]
    edits = WeightEdits(300)  # one of them stays in memory
    for layer in layers[:2]:
        edits.write(layer.weight, torch.zeros(8, 8))
    edits.undo()
    edits.write(layers[2].weight, torch.ones(8, 8))  # written after what was read
    edits.write(layers[0].weight, torch.ones(8, 8))
    edits.undo()
    assert all(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))


def test_a_rounding_that_fails_after_a_transform_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(hb.RTN, "round", fail)
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MemoryError):
        quantize(model, hb.SmoothQuant(alpha=0.5))
    assert same(model, before)


def test_a_fold_that_changes_the_model_is_undone_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = Fold.apply

    def broken(self: Fold, model: nn.Module, scale: Tensor, edits: WeightEdits) -> object:
        undo = apply(self, model, scale, edits)
        if self.producer == "0.norm":
            norm = model.get_submodule("0.norm")
            edits.write(norm.weight, norm.weight * 1.5)  # type: ignore[arg-type, operator]
        return undo

    monkeypatch.setattr(Fold, "apply", broken)
    with pytest.warns(hb.FallbackWarning, match=r"0\.norm: SmoothQuant: it changes the float model's output"):
        report = quantize(make(), hb.SmoothQuant(alpha=0.5))
    assert [r.producer for r in report.transforms if r.failed] == ["0.norm"]
    assert sum(not r.reason for r in report.transforms) == 3


@pytest.mark.parametrize("transform", [hb.SmoothQuant(), hb.AWQ()])
def test_padding_does_not_count_when_scales_are_chosen(transform: object) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.model = nn.Embedding(50, 64), make()

        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(self.embed(tokens))

    mask = torch.arange(12) < torch.tensor([12, 3, 7, 12, 1, 9])[:, None]
    tokens = torch.randint(2, 50, (6, 12), generator=torch.Generator().manual_seed(0))
    states = []
    for pad in (0, 1):
        torch.manual_seed(0)
        model = Masked()
        with torch.no_grad():
            model.embed.weight[0] = 0.0
            model.embed.weight[1] = 100.0 * torch.randn(64)
        batches = [{"tokens": torch.where(mask, tokens, pad), "attention_mask": mask.long()}] * 2
        recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"embed": None})
        hb.quantize_(model, recipe, data=batches, algorithms=[transform], progress=False)  # type: ignore[list-item]
        states.append({key: value for key, value in model.state_dict().items() if key.startswith("model")})
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
