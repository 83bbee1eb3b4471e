"""A prepared model in the loops that people write: checkpoints, moving averages, compilation, mixed dtypes, processes."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qat_models import assert_converts_to_the_same, conv_net, mean_square, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import halfbyte as hb

METHODS = [("auto", "auto"), ("learned", "learned"), ("learned", "pact")]


def images(count: int = 1, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


def prepared(weights: str = "auto", activations: str = "auto", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = conv_net()
    return hb.prepare_qat_(
        model,
        hb.int_static(4, 8),
        images()[0],
        weights=weights,
        activations=activations,
        on_fallback="allow",
        **options,
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    loss = mean_square(model(x))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_resuming_in_the_middle_continues_exactly(weights: str, activations: str, tmp_path: Path) -> None:
    schedule = hb.qat.Schedule(start=1, freeze_observers=3, freeze_batchnorm=4)
    model = prepared(weights, activations, schedule=schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = images(6)
    for x in batches[:4]:
        step(model, optimizer, x)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "middle.pt")
    resumed = prepared(weights, activations, schedule=schedule)
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    saved = torch.load(tmp_path / "middle.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for x in batches[4:]:
        assert step(model, optimizer, x) == step(resumed, other, x)
    assert_same_tensors(model, resumed)
    assert_converts_to_the_same(resumed, (batches[0],))


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_copies_and_pickles_train_and_convert_alike(weights: str, activations: str) -> None:
    model = prepared(weights, activations)
    train(model, images(2))
    model.eval()
    model(images()[0])  # leaves integers behind, which no copy needs
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        train(each, images(2, seed=1))
    train(model, images(2, seed=1))
    for each in copies:
        assert_same_tensors(each, model)
        assert each[0].batch_norm is each[1]
        assert_converts_to_the_same(each, (images()[0],))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_average_of_weights_converts(use_buffers: bool) -> None:
    model = prepared("learned", "learned")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in images(4):
        step(model, optimizer, x)
        average.update_parameters(model)
    if not use_buffers:
        for own, trained in zip(average.module.buffers(), model.buffers(), strict=True):
            own.copy_(trained)
    assert not torch.equal(average.module[0].weight, model[0].weight)
    assert_converts_to_the_same(average.module.eval(), (images()[0],))


def test_float_checkpoint_loads_into_a_prepared_model() -> None:
    torch.manual_seed(1)
    trained = conv_net()
    model = prepared()
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert all("quantizer" in name or "switches" in name for name in missing)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_gradient_checkpointing_changes_nothing(weights: str, activations: str, reentrant: bool) -> None:
    model = prepared(weights, activations)
    other = copy.deepcopy(model)
    for x in images(3):
        mean_square(model(x)).backward()
        h = x.clone().requires_grad_()
        for part in (other[:3], other[3:6], other[6:]):
            h = checkpoint(part, h, use_reentrant=reentrant)
        mean_square(h).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert_same_tensors(model, other)


@pytest.mark.parametrize(
    "scheme", [hb.int8_static(), hb.int8_dynamic(), hb.int_static(4, 4), hb.nf4_weight_only(9)], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_compiled_step_is_the_eager_one(scheme: hb.Scheme, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = conv_net().to(memory_format=memory_format)
    x = images()[0].to(memory_format=memory_format)
    hb.prepare_qat_(model, scheme, x)
    assert_compiles_to_the_same(model, x)


@pytest.mark.parametrize(("weights", "activations"), METHODS[1:])
def test_compiled_step_with_trained_scales_is_the_eager_one(weights: str, activations: str) -> None:
    assert_compiles_to_the_same(prepared(weights, activations), images()[0])


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_one_graph_trains_on_batches_of_any_size(weights: str, activations: str) -> None:
    model = prepared(weights, activations).train()
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 2, 3):
        x = images()[0][:count]
        for net in (compiled, eager):
            mean_square(net(x)).backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def assert_compiles_to_the_same(model: nn.Module, x: Tensor) -> None:
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, eager)]
    for _ in range(3):
        assert step(compiled, optimizers[0], x) == pytest.approx(step(eager, optimizers[1], x), rel=1e-5)
    for a, b in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert_converts_to_the_same(model, (x,))


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_autocast_trains_and_converts(weights: str, activations: str) -> None:
    model = prepared(weights, activations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x in images(1) * 6:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mean_square(model(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert losses[-1] < losses[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_converts_to_the_same(model, (images()[0],))


def test_model_in_bfloat16_trains_and_converts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4)).bfloat16()
    hb.prepare_qat_(model, hb.int8_static())
    x = torch.randn(6, 48, dtype=torch.bfloat16)
    train(model, [x] * 3)
    assert_converts_to_the_same(model, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_prepared_model_moves_to_half_precision(weights: str, activations: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    hb.prepare_qat_(model, hb.int_static(4, 8), weights=weights, activations=activations)
    model.to(dtype)
    batches = [torch.randn(8, 16, dtype=dtype) for _ in range(4)]
    assert all(map(math.isfinite, train(model, batches, lr=0.01)))
    assert_converts_to_the_same(model, (batches[0],))


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_nan_in_a_batch_reaches_no_scale_and_no_range(weights: str, activations: str) -> None:
    model = prepared(weights, activations).train()
    x = images()[0]
    mean_square(model(x)).backward()
    model.zero_grad()
    x[0, 0, 0, 0] = math.nan
    mean_square(model(x)).backward()
    for scale in hb.qat.scale_parameters(model):
        assert scale.grad is None or scale.grad.isfinite().all()
    for layer in model.modules():
        if isinstance(layer, hb.qat.QATModule) and layer.input_quantizer is not None:
            assert all(buffer.isfinite().all() for buffer in layer.input_quantizer.buffers())


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_frozen_layers_get_no_gradient(weights: str, activations: str) -> None:
    model = prepared(weights, activations).train()
    first = next(layer for layer in model.modules() if isinstance(layer, hb.qat.QATModule))
    first.requires_grad_(False)
    mean_square(model(images()[0])).backward()
    assert all(p.grad is None for p in first.parameters())
    model.requires_grad_(False)
    assert not model(images()[0]).requires_grad


def test_gradients_accumulate_over_micro_batches() -> None:
    model = prepared()
    other = copy.deepcopy(model)
    hb.qat.freeze_batchnorm(model)
    hb.qat.freeze_batchnorm(other)
    for m in (model, other):
        train(m, images(1), steps=1, lr=0.0)
        hb.qat.freeze_observers(m)
        m.zero_grad()
    x = images()[0]
    mean_square(model(x)).backward()
    for half in x.chunk(2):
        (mean_square(other(half)) / 2).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("weights", "activations"), METHODS)
def test_two_processes_end_with_one_model(weights: str, activations: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("ddp_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), tmp_path / "store", tmp_path / f"{rank}.pt", weights, activations],
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(300) for process in workers] == [0, 0]
    finally:
        for process in workers:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["state"].keys() == second["state"].keys()
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    if activations == "auto":  # the moving average of what both have seen
        low = high = None
        for ours, theirs in zip(first["extremes"], second["extremes"], strict=True):
            a, b = torch.minimum(ours[0], theirs[0]), torch.maximum(ours[1], theirs[1])
            low, high = (a, b) if low is None else (low + 0.01 * (a - low), high + 0.01 * (b - high))
        torch.testing.assert_close(first["state"]["0.act_scale"], (high - low) / 255)
