"""Modules in parts: registration, names, ties, and what stays whole."""

import copy

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 64))
        self.bias = nn.Parameter(torch.randn(3, 32))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return nn.functional.linear(x, self.weight[expert], self.bias[expert])


class ExpertsInParts(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(map(hb.nn.as_linear, experts.weight, experts.bias))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](x)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.parts._registered", dict(hb.parts._registered))
    hb.register_module(Experts, ExpertsInParts)


def rows_of(plan: hb.Plan) -> dict[str, hb.PlanRow]:
    return {row.name: row for row in plan.rows}


@torch.no_grad()
def test_registered_module_is_quantized_saved_and_loaded(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    x = torch.randn(4, 64)
    expected = model["experts"](x, 2)
    plan = hb.plan(model, hb.int8_dynamic())
    assert list(rows_of(plan)) == ["experts.experts.0", "experts.experts.1", "experts.experts.2"]
    assert {row.part_of for row in plan.rows} == {"experts"}
    hb.quantize_(model, plan, progress=False)
    y = model["experts"](x, 2)
    assert ((y - expected).norm() / expected.norm()).item() < 0.02
    hb.save(model, tmp_path / "m.safetensors")
    loaded = hb.load_(nn.ModuleDict({"experts": Experts()}), tmp_path / "m.safetensors")
    assert torch.equal(loaded["experts"](x, 2), y)


def test_unregistered_module_stays_in_float_with_a_reason() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

    rows = rows_of(hb.plan(nn.Sequential(nn.Linear(4, 4), Other()), hb.int8_dynamic()))
    assert rows["1"].reason == "no quantized form of Other"


def test_reason_of_the_registration_is_given() -> None:
    hb.register_module(Experts, ExpertsInParts, why_float=lambda experts: "experts are few")
    rows = rows_of(hb.plan(nn.ModuleDict({"a": nn.Linear(4, 4), "b": Experts()}), hb.int8_dynamic()))
    assert (rows["b"].scheme, rows["b"].reason) == (None, "experts are few")


def test_registration_needs_a_class_of_modules() -> None:
    with pytest.raises(TypeError, match="not a class of modules"):
        hb.register_module(Experts(), ExpertsInParts)  # type: ignore[arg-type]


def test_patterns_name_the_whole_by_name_or_type_and_a_part_by_name() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(32, 32), "fc": nn.Linear(32, 32), "experts": Experts()})
    recipe = hb.Recipe(
        default=hb.int8_dynamic(),
        overrides={
            nn.LSTM: hb.int4_weight_only(16),
            "*.hh_l0": hb.int8_weight_only(),
            nn.Linear: None,
            "experts": None,
        },
    )
    rows = rows_of(hb.plan(model, recipe))
    assert rows["rnn.ih_l0"].scheme == hb.int4_weight_only(16)
    assert rows["rnn.hh_l0"].scheme == hb.int8_weight_only()
    assert rows["fc"].scheme is None
    assert (rows["experts"].scheme, rows["experts"].reason) == (None, "left as it is by the recipe")
    with pytest.raises(hb.QuantizationError, match=r"'rnn\.hh_l1' matches no module; the nearest names are rnn\.hh_l0"):
        hb.plan(model, hb.Recipe(default=hb.int8_dynamic(), overrides={"rnn.hh_l1": None}))


@torch.no_grad()
def test_module_left_whole_is_the_same_object_and_computes_the_same() -> None:
    rnn = nn.LSTM(32, 32)
    model = nn.ModuleDict({"rnn": rnn, "fc": nn.Linear(32, 32)})
    hb.quantize_(model, hb.Recipe(default=hb.int8_dynamic(), overrides={nn.LSTM: None}), progress=False)
    assert model["rnn"] is rnn


def test_module_under_two_names_stays_one_module() -> None:
    rnn = nn.GRU(32, 32)
    model = nn.ModuleDict({"a": rnn, "b": rnn})
    plan = hb.plan(model, hb.int8_dynamic())
    assert rows_of(plan)["a.ih_l0"].aliases == ("b.ih_l0",)
    hb.quantize_(model, plan, progress=False)
    assert model["a"] is model["b"] and isinstance(model["a"], hb.nn.QuantizedGRU)


def test_tied_hidden_weights_are_stored_once() -> None:
    first, second = nn.GRU(32, 32), nn.GRU(32, 32)
    second.weight_hh_l0 = first.weight_hh_l0
    model = nn.ModuleDict({"a": first, "b": second})
    plan = hb.plan(model, hb.int8_dynamic())
    assert rows_of(plan)["b.hh_l0"].tied_to == "a.hh_l0"
    hb.quantize_(model, plan, progress=False)
    assert model["a"].hh_l0.qweight is model["b"].hh_l0.qweight
    assert plan.bytes_after == sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())


def test_layer_that_is_the_model_itself_is_refused() -> None:
    with pytest.raises(hb.QuantizationError, match=r"the model itself is a LSTM.*wrap it"):
        hb.plan(nn.LSTM(4, 4), hb.int8_dynamic())


def test_plan_of_another_model_is_refused() -> None:
    plan = hb.plan(nn.ModuleDict({"rnn": nn.LSTM(32, 32)}), hb.int8_dynamic())
    with pytest.raises(hb.QuantizationError, match=r"the plan names rnn\.ih_l0"):
        hb.quantize_(nn.ModuleDict({"rnn": nn.Linear(32, 32)}), plan)


@torch.no_grad()
def test_conv1d_of_transformers_is_a_linear_layer() -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(48, 32))
    nn.init.normal_(model[0].weight)
    x = torch.randn(2, 3, 32)
    expected = model(x)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert isinstance(model[0], hb.nn.QuantizedLinear) and model[0].out_features == 48
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.02


@torch.no_grad()
def test_verify_proves_recurrent_and_attention_layers() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(32, 32, bidirectional=True, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.rnn(x)[0])

    model = Net().eval()
    x = torch.randn(2, 5, 32)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    hb.verify(model, [x])


@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_weight_only(16)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_bilinear_form_is_one_linear_layer(scheme: hb.Scheme, bias: bool) -> None:
    torch.manual_seed(0)
    reference = nn.Bilinear(12, 32, 5, bias=bias)
    model = nn.ModuleDict({"form": copy.deepcopy(reference)})
    plan = hb.plan(model, scheme)
    assert rows_of(plan)["form.linear"].shape == (60, 32)
    hb.quantize_(model, plan, progress=False)
    assert plan.bytes_after == sum(t.nbytes for t in model.state_dict().values())
    reference.weight.copy_(model["form"].linear.weight.reshape(5, 12, 32))
    for sizes in ((), (7,), (2, 3)):
        inputs = torch.randn(*sizes, 12), torch.randn(*sizes, 32)
        torch.testing.assert_close(model["form"](*inputs), reference(*inputs), rtol=0.02, atol=0.05)
    with pytest.raises(ValueError, match="12 and 32 features"):
        model["form"](torch.randn(2, 12), torch.randn(2, 31))
    with pytest.raises(ValueError, match="same sizes before it"):
        model["form"](torch.randn(2, 12), torch.randn(3, 32))
