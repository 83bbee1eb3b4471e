"""hb.compare: its figures against plain formulas, and what it does with every kind of output."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.hidden(self.table(tokens)).relu())


@pytest.fixture(scope="module")
def pair() -> tuple[Classifier, Classifier]:
    torch.manual_seed(0)
    original = Classifier()
    model = copy.deepcopy(original)
    hb.quantize_(model, hb.int4_weight_only(16), progress=False)
    return original, model


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (2 + i, 7), generator=generator) for i in range(count)]


def outputs_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(b).reshape(-1, 10) for b in batches()]).double()


def test_figures_are_those_of_the_formulas(pair: tuple[Classifier, Classifier]) -> None:
    (result,) = hb.compare(*pair, batches()).outputs
    a, b = outputs_of(pair[0]), outputs_of(pair[1])
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    expected = {
        "elements": a.numel(),
        "positions": len(a),
        "relative_error": ((b - a).norm() / a.norm()).item(),
        "max_abs_error": (b - a).abs().max().item(),
        "cosine": F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item(),
        "kl": kl.mean().item(),
        "kl_margin": 1.96 * (kl.std() / math.sqrt(len(a))).item(),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    }
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4), name
    assert result.sqnr_db == pytest.approx(10 * math.log10((a.norm() ** 2 / (b - a).norm() ** 2).item()))


def test_a_model_compared_with_itself_differs_by_nothing(pair: tuple[Classifier, Classifier]) -> None:
    original = pair[0]
    same = copy.deepcopy(original)
    hb.quantize_(same, hb.Recipe(default=None, overrides={"hidden": hb.int8_weight_only()}), progress=False)
    same.hidden = copy.deepcopy(original.hidden)
    hb.quantize_(same, hb.Recipe(default=None, overrides={"head": hb.int8_weight_only()}), progress=False)
    report = hb.compare(original, same, batches())
    assert [m.name for m in report.modules] == ["head"]


def test_own_error_of_a_module_is_that_on_float_inputs(pair: tuple[Classifier, Classifier]) -> None:
    original, model = pair
    report = hb.compare(original, model, batches())
    by_name = {m.name: m for m in report.modules}
    with torch.no_grad():
        x = torch.cat([original.hidden(original.table(b)).relu().reshape(-1, 32) for b in batches()])
        expected = (model.head(x) - original.head(x)).double().norm() / original.head(x).double().norm()
    assert by_name["head"].relative_error == pytest.approx(expected.item(), rel=1e-5)
    assert by_name["head"].calls == 3
    assert report.worst_modules[0].relative_error == max(m.relative_error for m in report.modules)


def test_largest_error_belongs_to_the_module_with_the_fewest_bits(pair: tuple[Classifier, Classifier]) -> None:
    model = copy.deepcopy(pair[0])
    recipe = hb.Recipe(default=hb.int8_weight_only(), overrides={"hidden": hb.int_weight_only(2, 16)})
    hb.quantize_(model, recipe, progress=False)
    assert hb.compare(pair[0], model, batches()).worst_modules[0].name == "hidden"


def test_masked_positions_are_not_counted(pair: tuple[Classifier, Classifier]) -> None:
    tokens = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    (result,) = hb.compare(*pair, [{"tokens": tokens, "attention_mask": mask}]).outputs
    (short,) = hb.compare(*pair, [tokens[:1], tokens[1:, :4]]).outputs
    assert result.positions == 11
    assert result.kl == pytest.approx(short.kl)
    assert result.relative_error == pytest.approx(short.relative_error)


@dataclass
class Result:
    logits: Tensor
    note: str


@pytest.mark.parametrize(
    ("pack", "names", "distributions"),
    [
        (lambda y: (y, y[..., :1]), ["0", "1"], ["0"]),
        (lambda y: [y, None, (y,)], ["0", "2.0"], ["0", "2.0"]),
        (
            lambda y: {"logits": y, "hidden_states": (y, y)},
            ["logits", "hidden_states.0", "hidden_states.1"],
            ["logits"],
        ),
        (lambda y: {"last_hidden_state": y, "pooler_output": y[:, 0]}, ["last_hidden_state", "pooler_output"], []),
        (lambda y: Result(y, "text"), ["logits"], ["logits"]),
        (lambda y: {"scores": y, "best": y.argmax(-1)}, ["scores"], ["scores"]),
        (lambda y: y.mean(), ["output"], []),
    ],
)
def test_outputs_of_every_kind_are_compared(
    pair: tuple[Classifier, Classifier], pack: Callable[[Tensor], object], names: list[str], distributions: list[str]
) -> None:
    report = hb.compare(*pair, batches(), forward=lambda model, batch: pack(model(batch)))
    assert [o.name for o in report.outputs] == names
    assert [o.name for o in report.outputs if o.kl is not None] == distributions


def test_transformers_output_is_compared_by_its_logits() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    original = transformers.LlamaForCausalLM(config).eval()
    model = copy.deepcopy(original)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    report = hb.compare(original, model, [{"input_ids": torch.arange(12)[None]}])
    (logits,) = report.outputs
    assert logits.name == "logits"
    assert logits.positions == 12
    assert 0 < logits.kl < 0.01


def test_kind_decides(pair: tuple[Classifier, Classifier]) -> None:
    (regression,) = hb.compare(*pair, batches(), kind="regression").outputs
    assert regression.kl is None and regression.positions == 0
    states = lambda model, batch: {"last_hidden_state": model(batch)}  # noqa: E731
    (forced,) = hb.compare(*pair, batches(), forward=states, kind="logits").outputs
    assert forced.kl is not None
    with pytest.raises(ValueError, match="kind='probabilities'"):
        hb.compare(*pair, batches(), kind="probabilities")  # type: ignore[arg-type]


def test_forbidden_logits_do_not_count(pair: tuple[Classifier, Classifier]) -> None:
    def masked(model: nn.Module, batch: object) -> Tensor:
        return model(batch).index_fill(-1, torch.tensor([3]), -math.inf)

    (result,) = hb.compare(*pair, batches(), forward=masked).outputs
    assert math.isfinite(result.kl) and math.isfinite(result.relative_error)
    assert result.elements == sum(b.numel() for b in batches()) * 9


def test_broken_model_shows(pair: tuple[Classifier, Classifier]) -> None:
    model = copy.deepcopy(pair[1])
    model.head.bias.data[0] = math.inf
    (result,) = hb.compare(pair[0], model, batches()).outputs
    assert result.relative_error == math.inf
    assert result.sqnr_db == -math.inf


def test_random_models_get_the_same_random_numbers(pair: tuple[Classifier, Classifier]) -> None:
    def noisy(model: nn.Module, batch: object) -> Tensor:
        return model(batch) + 100 * torch.randn(1)

    state = torch.get_rng_state()
    (result,) = hb.compare(*pair, batches(), forward=noisy).outputs
    assert result.max_abs_error < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_models_are_left_as_they_were(pair: tuple[Classifier, Classifier]) -> None:
    original, model = (copy.deepcopy(m).train() for m in pair)
    model.head.eval()
    before = [m.training for m in (*original.modules(), *model.modules())]
    with pytest.raises(RuntimeError, match="stop"):
        hb.compare(original, model, batches(), forward=lambda m, b: (_ for _ in ()).throw(RuntimeError("stop")))
    hb.compare(original, model, iter(batches()))
    assert [m.training for m in (*original.modules(), *model.modules())] == before
    assert not any(m._forward_hooks for m in (*original.modules(), *model.modules()))


def test_report_reads_as_text_html_and_dict(pair: tuple[Classifier, Classifier]) -> None:
    report = hb.compare(*pair, batches())
    assert "KL (nats)" in str(report) and "hidden" in str(report)
    assert report._repr_html_().count("<table>") == 2
    described = json.loads(json.dumps(report.to_dict()))
    assert described["outputs"][0]["positions"] == sum(b.numel() for b in batches())


def test_module_that_never_runs_is_said_so(pair: tuple[Classifier, Classifier]) -> None:
    report = hb.compare(*pair, [torch.zeros(2, 32)], forward=lambda model, x: model.head(x))
    assert [m.name for m in report.modules if m.relative_error is None] == ["table", "hidden"]
    assert "never ran" in str(report)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda a, b: (b, b, batches()), hb.QuantizationError, "float_model is quantized .*deepcopy"),
        (lambda a, b: (a, a, batches()), hb.QuantizationError, "no quantized modules"),
        (lambda a, b: (nn.Sequential(), b, batches()), hb.QuantizationError, "no Linear or Embedding named table"),
        (lambda a, b: (a, b, []), hb.QuantizationError, "no batches"),
        (lambda a, b: (a, b, iter([])), hb.QuantizationError, "gave no batches"),
        (lambda a, b: (a, "b", []), TypeError, "model is a str"),
    ],
)
def test_bad_arguments_are_refused(
    pair: tuple[Classifier, Classifier], arguments: Callable[..., tuple], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hb.compare(*arguments(*pair))


def test_outputs_that_cannot_be_compared_are_refused(pair: tuple[Classifier, Classifier]) -> None:
    with pytest.raises(hb.QuantizationError, match="no floating-point tensor"):
        hb.compare(*pair, batches(), forward=lambda model, batch: "text")
    with pytest.raises(hb.QuantizationError, match="return different things"):
        hb.compare(*pair, batches(), forward=lambda m, b: m(b) if m is pair[0] else m(b)[:1])
