"""Static INT8: the scheme through every verb, what the layers compute, files, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_plan import mlp
from test_workflow import assert_unchanged, snapshot
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = [
    hb.int8_static(),
    hb.int8_static(per_channel=False),
    hb.int8_static(symmetric=True, observer=hb.observers.MinMax()),
    hb.int4_int8_static(),
    hb.int4_int8_static(32),
    hb.int_static(4, 4),
    hb.int_static(8, 2, symmetric=True),
    hb.int_static(1, 7),
]


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_compute_with_fake_quantized_inputs_and_dequantized_weights(scheme: hb.Scheme) -> None:
    torch.manual_seed(0)
    model = mlp()
    hb.quantize_(model, scheme, batches(), progress=False)
    x = batches()[0]
    for layer in model:
        y = layer(x)
        if isinstance(layer, hb.nn.QuantizedLinear):
            half = 1 << (scheme.activation.bits - 1)
            q = hb.ops.fake_quantize(x, layer.act_scale, layer.act_zero_point, qmin=-half, qmax=half - 1)
            expected = nn.functional.linear(q.double(), layer.dequantize().double(), layer.bias.double())
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        x = y


@pytest.mark.parametrize("symmetric", [False, True])
def test_qparams_are_those_of_the_observer(symmetric: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    hb.quantize_(model, hb.int8_static(symmetric=symmetric, observer=hb.observers.MinMax()), batches(), progress=False)
    observer = hb.observers.MinMax(symmetric=symmetric)
    for batch in batches():
        observer.update(batch)
    scale, zero_point = observer.qparams()
    assert torch.equal(model[0].act_scale, scale)
    assert int(model[0].act_zero_point) == int(zero_point) - (0 if symmetric else 128)


def test_per_tensor_weights_have_one_scale() -> None:
    model = mlp()
    hb.quantize_(model, hb.int8_static(per_channel=False), batches(), progress=False)
    for layer in (m for m in model if isinstance(m, hb.nn.QuantizedLinear)):
        assert layer.scale.unique().numel() == 1
        assert int(layer.packed_weight.codes(layer.weight_format).codes.abs().max()) == 127


def test_steps_give_what_one_call_gives() -> None:
    torch.manual_seed(0)
    model = mlp()
    at_once = copy.deepcopy(model)
    hb.quantize_(at_once, hb.int8_static(), batches(), progress=False)
    hb.prepare_(model, hb.int8_static())
    hb.calibrate(model, batches()[:2], progress=False)
    hb.calibrate(model, batches()[2:], progress=False)
    hb.convert_(model, progress=False)
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_verify_passes_and_a_file_gives_equal_bits(tmp_path: Path) -> None:
    model = mlp()
    float_model = copy.deepcopy(model)
    report = hb.quantize_(model, hb.int8_static(), batches(), progress=False)
    assert hb.verify(model, batches()[:1]).ok
    hb.save(model, tmp_path / "m.safetensors")
    loaded = hb.load_(float_model, tmp_path / "m.safetensors")
    assert torch.equal(loaded(batches()[0]), model(batches()[0]))
    assert report.bytes_after == sum(t.nbytes for t in model.state_dict().values())
    exported = torch.export.export(model, (batches()[0],))
    assert torch.equal(exported.module()(batches()[0]), model(batches()[0]))


def test_half_precision_model_keeps_its_activation_scales() -> None:
    model = mlp()
    hb.quantize_(model, hb.int8_static(), batches(), progress=False)
    scale = model[0].act_scale.clone()
    model.half()
    assert model[0].act_scale.dtype == torch.float32
    assert torch.equal(model[0].act_scale, scale)
    assert model(batches()[0].half()).dtype == torch.float16


def test_report_shows_ranges() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    report = hb.quantize_(model, hb.int8_static(), batches(12), progress=False)
    first, second = (next(m for m in report.modules if m.name == name).activation for name in "02")
    assert first.batches == 12
    assert first.samples == 12 * 16 * 64
    assert first.low < -2 < 2 < first.high
    assert second.low == 0
    assert "input range" in str(report)
    assert report.to_dict()["modules"][0]["activation"]["observer"] == "MSE"


def test_until_stable_stops_early_and_never_before_ranges_settle() -> None:
    data = batches(200)
    model = mlp()
    hb.calibrate(hb.prepare_(model, hb.int8_static()), data, until_stable=True, progress=False)
    report = hb.convert_(model, progress=False)
    assert 8 <= report.calibration_batches < 200
    assert all(m.activation.converged for m in report.modules if m.activation)
    growing = [x * (1 + i) for i, x in enumerate(data[:40])]
    model = mlp()
    hb.calibrate(hb.prepare_(model, hb.int8_static()), growing, until_stable=True, progress=False)
    assert hb.convert_(model, progress=False).calibration_batches == 40


def test_until_stable_needs_static_activations() -> None:
    model = hb.prepare_(mlp(), hb.int4_weight_only(32))
    with pytest.raises(hb.QuantizationError, match="until_stable"):
        hb.calibrate(model, batches(), until_stable=True)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(64, 64)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


BAD_DATA = {
    "no data": (mlp, None, "static activations needs calibration data"),
    "no batches": (mlp, [], "no batches"),
    "only empty batches": (mlp, [torch.empty(0, 64)], "0 never ran"),
    "a layer that never ran": (Branches, batches(), "unused never ran on the data"),
    "NaN": (mlp, [*batches(2), torch.full((2, 64), torch.nan)], "batch 2 of the data: the input of 0: NaN"),
    "inf": (mlp, [torch.full((2, 64), torch.inf)], "batch 0 of the data: the input of 0: inf"),
    "integers": (mlp, [torch.ones(2, 64, dtype=torch.int64)], r"batch 0 of the data: 0: its input is torch\.int64"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_and_the_model_as_it_was(case: str) -> None:
    make, data, message = BAD_DATA[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=message):
        hb.quantize_(model, hb.int8_static(), data, progress=False)
    assert_unchanged(model, before)


def test_convert_without_calibration_says_so() -> None:
    model = hb.prepare_(mlp(), hb.int8_static())
    with pytest.raises(hb.QuantizationError, match=r"run hb\.calibrate"):
        hb.convert_(model)
    hb.calibrate(model, batches(), progress=False)
    hb.convert_(model, progress=False)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_constant_activations_and_batches_of_one_row(value: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    expected = model(torch.full((1, 64), value))
    hb.quantize_(model, hb.int8_static(), [torch.full((1, 64), value), torch.empty(0, 64)], progress=False)
    torch.testing.assert_close(model(torch.full((1, 64), value)), expected, rtol=1e-2, atol=1e-2)


def test_a_model_in_train_mode_is_calibrated_as_it_will_be_used() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8)).train()
    evaluated = copy.deepcopy(model).eval()
    statistics = model[1].running_mean.clone()
    hb.quantize_(model, hb.int8_static(), batches(), progress=False)
    hb.quantize_(evaluated, hb.int8_static(), batches(), progress=False)
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(model[3].act_scale, evaluated[3].act_scale)


def test_a_layer_used_twice_gets_the_range_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * self.layer(x))

    model = Twice()
    report = hb.quantize_(model, hb.int8_static(observer=hb.observers.MinMax()), batches(1), progress=False)
    assert report.modules[0].activation.batches == 2
    assert report.modules[0].activation.high > batches(1)[0].max()


def test_recurrent_layers_have_static_scales_of_inputs_and_hidden_states() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(64, 32, batch_first=True)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    model = Recurrent()
    data = [torch.randn(2, 5, 64)]
    expected = model(data[0])
    report = hb.quantize_(model, hb.int8_static(), data, progress=False, on_fallback="allow")
    assert report.fallbacks == ()
    assert all(layer.act_scale is not None for layer in (model.lstm.ih_l0, model.lstm.hh_l0, model.head))
    torch.testing.assert_close(model(data[0]), expected, atol=0.05, rtol=0)


def test_gptq_works_with_static_activations() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    report = hb.quantize_(model, hb.int4_int8_static(32), batches(8), [hb.GPTQ()], progress=False)
    assert report.modules[0].rounding == "GPTQ"
    assert model[0].act_scale is not None
    with pytest.raises(hb.QuantizationError, match="one scale for all outputs"):
        hb.quantize_(
            nn.Sequential(nn.Linear(64, 32)), hb.int8_static(per_channel=False), batches(8), [hb.GPTQ()], progress=False
        )


def _calibrate_share(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = mlp()
    hb.prepare_(model, hb.int4_int8_static(32))
    data = batches(8)
    for half in (data[:4], data[4:]):
        hb.calibrate(model, half[rank::world], distributed=True, progress=False)
    report = hb.convert_(model, progress=False)
    state = {**model.state_dict(), "seen": torch.tensor(report.modules[0].activation.batches)}
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_that_share_the_data_end_up_with_the_same_model(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_calibrate_share, args=(2, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    alone = mlp()
    hb.quantize_(alone, hb.int4_int8_static(32), batches(8), progress=False)
    assert int(states[0].pop("seen")) == int(states[1].pop("seen")) == 8
    for name, tensor in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-6, atol=0)


def test_distributed_needs_a_process_group() -> None:
    model = hb.prepare_(mlp(), hb.int8_static())
    with pytest.raises(RuntimeError, match="init_process_group"):
        hb.calibrate(model, batches(), distributed=True)


def test_schemes_differ_in_what_is_computed_not_in_the_observer() -> None:
    assert hb.int8_static() == hb.int8_static(observer=hb.observers.MinMax())
    assert hb.int8_static() != hb.int8_static(symmetric=True)
    assert hb.Scheme.from_dict(hb.int8_static().to_dict()) == hb.int8_static()
    with pytest.raises(ValueError, match="does not observe whole tensors"):
        hb.int8_static(observer=hb.observers.MinMax(axis=1))
