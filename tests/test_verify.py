"""hb.verify: passes on what is right, finds what is wrong, and leaves no trace."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import ops
from halfbyte._extension import available_capabilities, cpu_capability

SCHEMES = {
    "int8_dynamic": hb.int8_dynamic(),
    "int8_asymmetric": hb.int8_dynamic(symmetric=False),
    "int8_weight_only": hb.int8_weight_only(),
    "int4_group": hb.int4_weight_only(16),
    "int4_symmetric": hb.int4_weight_only(16, symmetric=True),
    "int4_int8": hb.int4_int8_dynamic(16),
    "int4_int8_symmetric": hb.int4_int8_dynamic(16, symmetric=True),
    **{f"int{bits}": hb.int_weight_only(bits) for bits in (2, 3, 5, 6, 7)},
    "binary": hb.int_weight_only(1),
    "ternary": hb.ternary_weight_only(),
    "nf4": hb.nf4_weight_only(16),
    "nf4 tables": hb.Recipe(default=hb.nf4_weight_only(16), overrides={nn.Embedding: hb.fp4_weight_only(16)}),
    "codebook": hb.codebook_weight_only((-1, -0.4, 0.1, 0.5, 1), None),
}


class TextModel(nn.Module):
    """Table tied to the head, a table of its own, a layer with a bias, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.positions = nn.Embedding(12, 32)
        self.hidden = nn.Linear(32, 48)
        self.back = nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        self.idle = nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return {"logits": self.head(x + self.back(self.hidden(x).relu()))}


def quantized(scheme: hb.Scheme | hb.Recipe, dtype: torch.dtype = torch.float32) -> TextModel:
    torch.manual_seed(0)
    model = TextModel().to(dtype)
    hb.quantize_(model, scheme, progress=False, on_fallback="allow")
    return model


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (3, 12), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_passes(name: str) -> None:
    report = hb.verify(quantized(SCHEMES[name]), batches())
    assert report.ok, report.failures
    report.raise_if_failed()
    assert report.never_ran == ("idle",)
    assert report.levels == tuple(available_capabilities())
    assert {1, 2} <= set(report.threads)
    assert report.batches == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int8_dynamic", "int4_group"])
def test_half_precision_models_pass(name: str, dtype: torch.dtype) -> None:
    report = hb.verify(quantized(SCHEMES[name], dtype), batches(1))
    assert report.ok, report.failures


def test_integer_products_are_compared_one_by_one() -> None:
    report = hb.verify(quantized(hb.int8_dynamic()), batches(1), max_rows=7)
    hidden = next(m for m in report.modules if m.name == "hidden")
    assert (hidden.calls, hidden.rows, hidden.integers) == (1, 7, 7 * 48)


def test_odd_shapes_and_extreme_inputs_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(67, 17), nn.Linear(17, 5))
    hb.quantize_(model, hb.int4_int8_dynamic(32), progress=False, on_fallback="allow")
    x = torch.randn(6, 67)
    x[0] = 0
    x[1] = 1e-40
    x[2] = 1e37
    x[3, 4] = math.inf
    x[4, 5] = math.nan
    report = hb.verify(model, [x, torch.zeros(0, 67), torch.randn(67)])
    assert report.ok, report.failures


def test_modules_of_another_float_type_are_covered_by_the_model_checks() -> None:
    report = hb.verify(quantized(hb.Recipe(default=hb.int8_dynamic(), overrides={"back": hb.bf16()})), batches(1))
    assert report.ok, report.failures
    assert "back" not in [m.name for m in report.modules]


def broken(monkeypatch: pytest.MonkeyPatch, operator: str, change: Callable[[Tensor], Tensor]) -> None:
    whole = getattr(ops, operator)
    monkeypatch.setattr(ops, operator, lambda *args, **kwargs: change(whole(*args, **kwargs)))


def next_float(y: Tensor) -> Tensor:
    return torch.nextafter(y, torch.full_like(y, math.inf))


def assert_fails(report: hb.VerifyReport, words: str) -> None:
    assert not report.ok
    assert any(words in failure for failure in report.failures), report.failures
    with pytest.raises(hb.VerificationError, match=words):
        report.raise_if_failed()
    assert "FAILED" in str(report)


def test_one_bit_of_difference_between_levels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(available_capabilities()) == 1:
        pytest.skip("this CPU has no second level")
    model, other = quantized(hb.int8_dynamic()), available_capabilities()[0]
    broken(monkeypatch, "linear_int8", lambda y: next_float(y) if cpu_capability() == other else y)
    report = hb.verify(model, batches(1))
    assert_fails(report, "levels, threads or batch sizes differ")
    assert_fails(report, "model: ISA levels: outputs differ")


def test_one_bit_of_difference_between_threads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = quantized(hb.int4_weight_only(16)), torch.get_num_threads()
    broken(monkeypatch, "linear_weight_only", lambda y: y if torch.get_num_threads() == own else next_float(y))
    report = hb.verify(model, batches(1))
    assert_fails(report, "levels, threads or batch sizes differ")
    assert_fails(report, "model: threads: outputs differ")


def test_rows_that_depend_on_their_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "linear_int8", lambda y: y if y.numel() < 3 * 12 * 32 else next_float(y))
    assert_fails(hb.verify(quantized(hb.int8_dynamic()), batches(1), max_rows=8), "batch sizes differ")


def test_one_wrong_integer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(x: Tensor, qweight: Tensor, *args: object, **kwargs: object) -> Tensor:
        wrong = qweight.clone()
        wrong[0, 0] ^= 1  # the lowest bit of one weight
        return linear_int8(x, wrong, *args, **kwargs)

    linear_int8 = ops.linear_int8
    monkeypatch.setattr(ops, "linear_int8", off_by_one)
    assert_fails(hb.verify(quantized(hb.int8_dynamic()), batches(1)), "integer products are wrong")


@pytest.mark.parametrize(
    ("operator", "scheme"), [("linear_int8", "int8_dynamic"), ("linear_weight_only", "int4_group")]
)
def test_results_past_the_rounding_bound_are_found(operator: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, operator, lambda y: y * (1 + 1e-4) + 1e-4)
    assert_fails(hb.verify(quantized(SCHEMES[scheme]), batches(1)), "times the rounding bound")


def test_one_wrong_bit_of_a_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "embedding_weight_only", next_float)
    report = hb.verify(quantized(hb.int8_dynamic()), batches(1))
    assert_fails(report, "table: integer products are wrong")


def test_code_outside_the_format_is_found() -> None:
    model = quantized(hb.int8_weight_only())
    model.positions.qweight[0, 0] = 0  # code -128, which the format does not use
    assert_fails(hb.verify(model, batches(1)), "positions: packing does not reproduce its codes")


def test_stray_bits_in_the_padding_are_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 5))  # one panel of 16 outputs, 11 of them padding
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    model[0].qweight[0, -1] = 1
    assert_fails(hb.verify(model, [torch.randn(2, 32)]), "0: packing does not reproduce its codes")


def test_file_that_loses_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(skeleton: nn.Module, path: object) -> nn.Module:
        loaded = hb.load_(skeleton, path)
        loaded.hidden.bias.data += 1
        return loaded

    monkeypatch.setitem(hb.verify.__globals__, "load_", lossy)
    assert_fails(hb.verify(quantized(hb.int8_dynamic()), batches(1)), "model: save and load_: outputs differ")


def test_model_that_does_not_repeat_itself_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(hb.int8_dynamic())
    model.calls = 0

    def count(module: nn.Module, args: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
        module.calls += 1
        return {"logits": output["logits"] + module.calls}

    model.register_forward_hook(count)
    assert_fails(hb.verify(model, batches(1)), "does not even repeat itself")


def test_random_models_get_the_same_random_numbers_each_time() -> None:
    class Noisy(TextModel):
        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            logits = super().forward(tokens)["logits"]
            return {"logits": logits + torch.randn_like(logits)}

    torch.manual_seed(0)
    model = Noisy()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    report = hb.verify(model, batches(1))
    assert report.ok, report.failures


def test_model_that_cannot_be_copied_is_verified_without_the_file() -> None:
    model = quantized(hb.int8_dynamic())
    model.lock = __import__("threading").Lock()
    report = hb.verify(model, batches(1))
    assert report.ok
    assert any("cannot be copied" in check.note for check in report.checks)


class Failing(RuntimeError):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails: bool) -> None:
    model = quantized(hb.int8_dynamic()).train()
    model.hidden.eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    before = (cpu_capability(), torch.get_num_threads(), torch.get_rng_state(), [m.training for m in model.modules()])

    def forward(subject: nn.Module, batch: object) -> object:
        torch.rand(3)
        if fails and torch.get_num_threads() != before[1]:
            raise Failing
        return subject(batch)

    if fails:
        with pytest.raises(Failing):
            hb.verify(model, batches(1), forward=forward)
    else:
        assert hb.verify(model, batches(1), forward=forward).ok
    assert cpu_capability() == before[0]
    assert torch.get_num_threads() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [m.training for m in model.modules()] == before[3]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_other_hooks_see_and_change_outputs_as_before() -> None:
    model = quantized(hb.int8_dynamic())
    model.hidden.register_forward_hook(lambda module, args, output: output * 2)
    report = hb.verify(model, batches(1))
    assert report.ok, report.failures


def test_report_reads_as_text_html_and_dict() -> None:
    report = hb.verify(quantized(hb.int8_dynamic()), iter(batches(1)))
    text = str(report)
    assert "all equal" in text and "never ran" in text and "save and load_" in text
    assert report._repr_html_().startswith("<table>")
    described = report.to_dict()
    assert described["ok"] is True
    assert described["never_ran"] == ["idle"]
    assert __import__("json").dumps(described)


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (lambda: TextModel(), batches, hb.QuantizationError, "no integer modules"),
        (lambda: quantized(hb.int8_dynamic()), list, hb.QuantizationError, "no batches"),
        (lambda: quantized(hb.int8_dynamic()), lambda: iter(()), hb.QuantizationError, "gave no batches"),
        (lambda: quantized(hb.int8_dynamic()), lambda: batches()[0], TypeError, "data is one tensor"),
        (lambda: "model", batches, TypeError, "pass an nn.Module"),
    ],
)
def test_bad_arguments_are_refused(
    model: Callable[[], nn.Module], data: Callable[[], Iterator[Tensor]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hb.verify(model(), data())


def test_max_rows_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_rows=0"):
        hb.verify(copy.deepcopy(quantized(hb.int8_dynamic())), batches(), max_rows=0)
