"""`prepare_qat_`, the switches of a prepared model, and what `convert_` refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qat_models import conv_net, train
from torch import Tensor, nn

import halfbyte as hb


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4))


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 48, generator=generator) for _ in range(count)]


def test_parameters_stay_the_very_same() -> None:
    model = mlp()
    before = dict(model.named_parameters())
    hb.prepare_qat_(model, hb.int8_static())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_batch_norm_keeps_its_names_and_is_folded_when_an_example_is_given() -> None:
    model = conv_net()
    names = set(model.state_dict())
    with pytest.warns(hb.FallbackWarning, match="give example_inputs"):
        hb.prepare_qat_(conv_net(), hb.int8_static())
    hb.prepare_qat_(model, hb.int8_static(), torch.randn(2, 3, 8, 8))
    assert names <= set(model.state_dict())
    assert model[0].batch_norm is model[1]


def test_training_normalizes_with_the_batch() -> None:
    torch.manual_seed(0)
    model = conv_net()
    x = 3 + 2 * torch.randn(16, 3, 8, 8)
    hb.prepare_qat_(model, hb.int8_weight_only(), x)
    model.train()
    with torch.no_grad():
        y = model[1](model[0](x))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0)
    assert not torch.equal(model[1].running_mean, torch.zeros(8))


def test_channel_that_batch_norm_switched_off_gives_no_nan() -> None:
    model = conv_net()
    with torch.no_grad():
        model[1].weight[2] = 0.0
    x = torch.randn(4, 3, 8, 8)
    hb.prepare_qat_(model, hb.int8_static(), x)
    train(model, [x] * 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_converting_in_training_mode_is_refused_and_changes_nothing() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    train(model, batches())
    layer = model[0]
    with pytest.raises(hb.QuantizationError, match=r"0 is in training mode; call model\.eval"):
        hb.convert_(model, progress=False)
    assert model[0] is layer


def test_converting_before_ranges_were_observed_is_refused() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    model.eval()
    with pytest.raises(hb.QuantizationError, match="range of the input of 0 was never observed"):
        hb.convert_(model, progress=False)
    with pytest.raises(hb.QuantizationError, match="range of the input of 0 was never observed"):
        model(batches()[0])


def test_converting_with_fake_quantization_off_is_refused() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    train(model, batches())
    hb.qat.set_enabled(model[2], activations=False)
    model.eval()
    with pytest.raises(hb.QuantizationError, match="fake quantization of 2 is off"):
        hb.convert_(model, progress=False)
    hb.qat.set_enabled(model)
    hb.convert_(model, progress=False)


def test_fake_quantization_off_computes_in_float() -> None:
    model = conv_net()
    x = torch.randn(4, 3, 8, 8)
    train(model, [x] * 2)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        hb.prepare_qat_(model, hb.int_weight_only(2), x)
        hb.qat.set_enabled(model, False)
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-4, atol=1e-4)


def test_preparing_twice_is_refused() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    with pytest.raises(hb.QuantizationError, match="prepared for training already"):
        hb.prepare_qat_(model, hb.int8_static())
    with pytest.raises(hb.QuantizationError, match="prepared"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False)
    with pytest.raises(hb.QuantizationError, match="prepared"):
        hb.prepare_(model, hb.int8_dynamic())


def test_failing_to_prepare_leaves_the_model() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "out": nn.Linear(8, 4)})
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="weights='magic' is unknown"):
        hb.prepare_qat_(model, hb.int8_dynamic(), weights="magic")
    assert all(module is before[name] for name, module in model.named_modules())
    with torch.no_grad():
        model["out"].weight[0, 0] = float("nan")
    with pytest.raises(hb.QuantizationError, match="out: weight has NaN"):
        hb.prepare_qat_(model, hb.int8_dynamic())
    assert all(module is before[name] for name, module in model.named_modules())


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(8, 16, sparse=True), nn.Linear(16, 4))
    with pytest.raises(hb.QuantizationError, match="0 has sparse=True"):
        hb.prepare_qat_(model, hb.int8_dynamic())
    assert type(model[0]) is nn.Embedding


def test_saving_a_prepared_model_is_refused(tmp_path: Path) -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_dynamic())
    with pytest.raises(hb.QuantizationError, match=r"hb.convert_\(model\)"):
        hb.save(model, tmp_path / "model.safetensors")


def test_saved_model_gives_what_training_evaluated(tmp_path: Path) -> None:
    model, x = conv_net(), torch.randn(4, 3, 8, 8)
    hb.prepare_qat_(model, hb.int_static(4, 4), x)
    train(model, [x] * 2)
    with torch.no_grad():
        expected = model.eval()(x)
        hb.convert_(model, progress=False)
        hb.save(model, tmp_path / "model.safetensors")
        loaded = conv_net()
        hb.load_(loaded, tmp_path / "model.safetensors")
        assert torch.equal(loaded.eval()(x), expected)


def test_ranges_are_moving_averages_of_the_extremes() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    observer = hb.observers.MovingAverageMinMax()
    model.train()
    for x in batches():
        model(x)
        observer.update(x)
    scale, zero_point = observer.qparams()
    act_scale, act_zero_point = model[0].input_quantizer.qparams()
    torch.testing.assert_close(act_scale, scale)
    assert int(act_zero_point) == int(zero_point) - 128


def test_batches_with_inf_do_not_count() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    train(model, batches())
    low = model[0].input_quantizer.low.clone()
    model(torch.full((2, 48), float("inf")))
    model(torch.full((2, 48), float("nan")))
    assert torch.equal(model[0].input_quantizer.low, low)


def test_frozen_observers_keep_their_range() -> None:
    model = mlp()
    hb.prepare_qat_(model, hb.int8_static())
    train(model, batches())
    hb.qat.freeze_observers(model)
    high = model[0].input_quantizer.high.clone()
    model(100 * batches()[0])
    assert torch.equal(model[0].input_quantizer.high, high)
    hb.qat.freeze_observers(model, False)
    model(100 * batches()[0])
    assert not torch.equal(model[0].input_quantizer.high, high)


def test_schedule_starts_and_freezes_by_step() -> None:
    model = conv_net()
    x = torch.randn(4, 3, 8, 8)
    schedule = hb.qat.Schedule(start=2, freeze_observers=4, freeze_batchnorm=5)
    hb.prepare_qat_(model, hb.int8_static(), x, schedule=schedule)
    seen = []
    for _ in range(7):
        train(model, [x], steps=1)
        seen.append((model[0].quantizes, model[0].input_quantizer.on("observing"), model[1].on("frozen")))
    assert [q for q, _, _ in seen] == [False, False, True, True, True, True, True]
    assert [o for _, o, _ in seen] == [True, True, True, True, False, False, False]
    assert [f for _, _, f in seen] == [False, False, False, False, False, True, True]
    model.eval()
    hb.convert_(model, progress=False)
    assert "qat_steps" not in model.state_dict()


@pytest.mark.parametrize("how", ["model", "method", "function"])
def test_schedule_advances_in_a_compiled_model(how: str) -> None:
    schedule = hb.qat.Schedule(start=2, freeze_observers=4, freeze_batchnorm=5)
    model, x = conv_net(), torch.randn(4, 3, 8, 8)
    hb.prepare_qat_(model, hb.int8_static(), x, schedule=schedule)
    model.train()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Callable[[Tensor], Tensor] = model
    if how == "model":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "method":
        model.compile(backend="aot_eager")
    else:
        compiled = torch.compile(lambda x: model(x), backend="aot_eager")
    for i in range(7):
        got, expected = compiled((1 + i) * x), eager((1 + i) * x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_schedule_in_one_graph_is_refused() -> None:
    model = hb.prepare_qat_(mlp(), hb.int8_static(), schedule=hb.qat.Schedule(start=2))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Schedule counts steps in Python"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(batches()[0])


def test_methods_are_given_by_pattern() -> None:
    model = conv_net()
    hb.prepare_qat_(
        model,
        hb.int_static(4, 8),
        torch.randn(4, 3, 8, 8),
        weights={"*": "lsq", nn.Linear: "mse"},
        activations={"0": "learned"},
    )
    layers = [module for module in model.modules() if isinstance(module, hb.qat.QATModule)]
    for layer in layers:
        assert isinstance(layer.weight_quantizer, hb.qat.LearnedWeight) == (not isinstance(layer, nn.Linear))
        assert isinstance(layer.input_quantizer, hb.qat.LearnedActivation) == (layer.name == "0")
    assert {isinstance(layer, nn.Linear) for layer in layers} == {True, False}


def test_methods_of_a_whole_reach_its_parts() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "head": nn.Linear(8, 4)})
    hb.prepare_qat_(model, hb.int_weight_only(4), weights={"lstm": "learned"})
    assert isinstance(model["lstm"].ih_l0.weight_quantizer, hb.qat.LearnedWeight)
    assert not isinstance(model["head"].weight_quantizer, hb.qat.LearnedWeight)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"fc": "lsq"}, hb.QuantizationError, "pattern of weights 'fc' matches no module"),
        ({"0": None}, TypeError, "names of methods"),
        ({0: "lsq"}, TypeError, "names or module types"),
        (["lsq"], TypeError, "neither a method nor patterns"),
        ({"2": "seq"}, ValueError, "2: weights='seq' does not quantize to"),
        ({"2": "best"}, ValueError, "2: weights='best' is unknown"),
    ],
)
def test_methods_that_cannot_be_are_refused(weights: object, error: type[Exception], message: str) -> None:
    model = mlp()
    kinds = [type(module) for module in model]
    with pytest.raises(error, match=message):
        hb.prepare_qat_(model, hb.int8_dynamic(), weights=weights)
    assert [type(module) for module in model] == kinds


def test_switches_need_a_prepared_model() -> None:
    for switch in (hb.qat.set_enabled, hb.qat.freeze_observers, hb.qat.freeze_batchnorm):
        with pytest.raises(hb.QuantizationError, match="prepare_qat_"):
            switch(mlp())


@pytest.mark.parametrize("field", ["start", "freeze_observers", "freeze_batchnorm"])
def test_schedule_checks_its_steps(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1 is negative"):
        hb.qat.Schedule(**{field: -1})
    with pytest.raises(TypeError, match=f"{field}=1.5"):
        hb.qat.Schedule(**{field: 1.5})
