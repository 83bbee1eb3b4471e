"""Parametrized and weight-normed modules: quantized as what they compute in evaluation mode."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import halfbyte as hb


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old(function: Callable[..., nn.Module], module: nn.Module, *arguments: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many models
        return function(module, *arguments)


BUILD = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(32, 48)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(32, 48)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(32, 48)),
    "own": lambda: parametrize.register_parametrization(nn.Linear(32, 48), "weight", Doubled()),
    "old weight_norm": lambda: old(nn.utils.weight_norm, nn.Linear(32, 48)),
    "old spectral_norm": lambda: old(nn.utils.spectral_norm, nn.Linear(32, 48)),
}


def build(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(BUILD[kind](), nn.Linear(48, 8)).eval()


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_layer_is_quantized_as_what_it_computes(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    x = torch.randn(4, 32)
    expected = model(x)
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    plan = hb.plan(model, hb.int8_dynamic())
    row = plan.rows[0]
    assert (row.name, row.scheme) == ("0", hb.int8_dynamic())
    assert "resolved: computed once" in row.reason
    assert plan.bytes_before == before
    assert torch.equal(model(x), expected)  # a plan changes nothing
    report = hb.quantize_(model, plan, [x], progress=False)
    assert isinstance(model[0], hb.nn.QuantizedLinear)
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.02
    assert report.bytes_after == sum(t.nbytes for t in model.state_dict().values())
    hb.save(model, tmp_path / "m.safetensors")
    for skeleton in (build(kind), nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8))):
        assert torch.equal(hb.load_(skeleton, tmp_path / "m.safetensors")(x), model(x))


@pytest.mark.parametrize("kind", BUILD)
def test_failed_call_leaves_the_parametrization(kind: str) -> None:
    model = build(kind).train()
    names, x = set(model.state_dict()), torch.randn(4, 32)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        hb.quantize_(model, hb.int8_dynamic(), [x], progress=False, forward=fail)
    assert set(model.state_dict()) == names
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    model.train()(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model[0].parameters())


@torch.no_grad()
def test_weight_norm_of_an_lstm_is_resolved_in_its_parts() -> None:
    torch.manual_seed(0)
    for wrap in (parametrizations.weight_norm, lambda m, name: old(nn.utils.weight_norm, m, name)):
        model = nn.ModuleDict({"rnn": wrap(nn.LSTM(32, 32), "weight_hh_l0")}).eval()
        x = torch.randn(5, 2, 32)
        expected = model["rnn"](x)[0]
        rows = {row.name: row for row in hb.plan(model, hb.int8_dynamic()).rows}
        assert set(rows) == {"rnn.ih_l0", "rnn.hh_l0"}
        assert "weight_hh_l0 resolved" in rows["rnn.hh_l0"].reason
        hb.quantize_(model, hb.int8_dynamic(), progress=False)
        assert isinstance(model["rnn"], hb.nn.QuantizedLSTM)
        assert ((model["rnn"](x)[0] - expected).norm() / expected.norm()).item() < 0.02


def test_layer_left_out_by_the_recipe_keeps_its_parametrization() -> None:
    model = build("weight_norm")
    layer = model[0]
    hb.quantize_(model, hb.Recipe(default=hb.int8_dynamic(), overrides={"0": None}), progress=False)
    assert model[0] is layer and parametrize.is_parametrized(layer)


def test_a_copy_of_a_prepared_model_converts() -> None:
    model = build("old weight_norm")
    hb.prepare_(model, hb.int8_dynamic())
    hb.calibrate(model, [torch.randn(4, 32)], progress=False)
    model = copy.deepcopy(model)
    hb.convert_(model, progress=False)
    assert isinstance(model[0], hb.nn.QuantizedLinear)
