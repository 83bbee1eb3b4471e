"""What a prepared model computes in evaluation mode is what it computes after `convert_`, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from qat_models import assert_converts_to_the_same, conv_net, train
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = {
    "int8_static": hb.int8_static(),
    "int8_static_symmetric": hb.int8_static(symmetric=True, per_channel=False),
    "int8_dynamic": hb.int8_dynamic(),
    "int8_dynamic_asymmetric": hb.int8_dynamic(symmetric=False),
    "w4a8_static": hb.int4_int8_static(),
    "w4a4_static": hb.int_static(4, 4),
    "w2a3_static_symmetric": hb.int_static(2, 3, 8, symmetric=True),
    "w4a8_dynamic": hb.int4_int8_dynamic(8),
    "int3_groups": hb.int_weight_only(3, 8),
    "int2": hb.int_weight_only(2),
    "ternary": hb.ternary_weight_only(),
    "binary": hb.int_weight_only(1),
    "nf4": hb.nf4_weight_only(8),
    "bf16": hb.bf16(),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "linear": (lambda: nn.Linear(48, 20), (5, 3, 48)),
    "linear_without_bias": (lambda: nn.Linear(48, 20, bias=False), (7, 48)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2), (2, 8, 9, 9)),
    "conv2d_depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), (2, 8, 9, 9)),
    "conv2d_reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9)),
    "conv2d_same": (lambda: nn.Conv2d(8, 12, 4, padding="same"), (2, 8, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 4, 3, padding=1), (2, 8, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 12, 3, stride=2), (2, 8, 7)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2, output_padding=1), (2, 8, 5, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(8, 4, 2, padding=1), (2, 8, 4, 4, 4)),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_evaluates_as_converted(layer: tuple[object, tuple[int, ...]], scheme: hb.Scheme) -> None:
    make, shape = layer
    torch.manual_seed(0)
    model = nn.Sequential(make())
    hb.prepare_qat_(model, scheme, on_fallback="allow")
    before = model[0].weight.detach().clone()
    losses = train(model, [randn(*shape, seed=s) for s in range(3)])
    assert all(loss == loss for loss in losses)
    assert not torch.equal(model[0].weight, before)
    report = assert_converts_to_the_same(model, (randn(*shape, seed=9),))
    assert report.modules[0].plan.scheme is not None


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_embedding_evaluates_as_converted(scheme: hb.Scheme) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 48, padding_idx=3), nn.Linear(48, 8))
    hb.prepare_qat_(model, hb.Recipe(default=scheme, overrides={nn.Embedding: scheme}), on_fallback="allow")
    ids = torch.arange(40).reshape(4, 10)
    train(model, [ids] * 3)
    assert_converts_to_the_same(model, (ids,))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int3_groups", "bf16"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_folded_batch_norm_evaluates_as_converted(
    scheme: str, frozen: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = conv_net().to(memory_format=memory_format)
    x = randn(8, 3, 8, 8).to(memory_format=memory_format)
    hb.prepare_qat_(model, SCHEMES[scheme], x, on_fallback="allow")
    train(model, [x] * 4)
    if frozen:
        hb.qat.freeze_batchnorm(model)
        running = model[1].running_mean.clone()
        train(model, [x] * 2)
        assert torch.equal(model[1].running_mean, running)
    assert_converts_to_the_same(model, (x,))
    assert isinstance(model[1], hb.nn.FoldedBatchNorm)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "w4a4_static"])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_empty_batches_pass(layer: str, scheme: str) -> None:
    make, shape = LAYERS[layer]
    model = nn.Sequential(make())
    hb.prepare_qat_(model, SCHEMES[scheme])
    train(model, [randn(*shape)])
    empty = torch.zeros(0, *shape[1:])
    model.train()
    training = model(empty)
    training.sum().backward()
    assert training.shape[0] == 0
    assert_converts_to_the_same(model, (empty,))


def test_tied_table_and_head_keep_one_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 48), nn.Linear(48, 48), nn.Linear(48, 40, bias=False))
    model[2].weight = model[0].weight
    hb.prepare_qat_(model, hb.int8_dynamic())
    assert model[2].weight is model[0].weight
    ids = torch.arange(40).reshape(4, 10)
    train(model, [ids] * 3)
    assert_converts_to_the_same(model, (ids,))
    assert model[0].qweight is model[2].qweight


def test_mixed_precision_recipe_gives_every_layer_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    recipe = hb.Recipe(
        default=hb.int4_int8_static(), overrides={"0": hb.int8_static(), "2": hb.int_weight_only(2, 16), "4": None}
    )
    hb.prepare_qat_(model, recipe)
    train(model, [randn(6, 48)] * 3)
    report = assert_converts_to_the_same(model, (randn(6, 48),))
    formats = {
        module.name: None if module.plan.scheme is None else module.plan.scheme.weight for module in report.modules
    }
    assert formats == {"0": hb.int8_static().weight, "2": hb.int_weight_only(2, 16).weight, "4": None}


def test_evaluation_follows_writes_that_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(48, 20))
    hb.prepare_qat_(model, hb.int8_dynamic())
    model.eval()
    x = randn(5, 48)
    with torch.no_grad():
        first = model(x)
        model[0].weight.data.mul_(2)  # as moving averages of weights are swapped in
        assert not torch.equal(model(x), first)
    assert_converts_to_the_same(model, (x,))


def test_gradients_in_evaluation_mode_are_those_of_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4))
    hb.prepare_qat_(model, hb.int8_dynamic())
    other = copy.deepcopy(model).eval()
    x = randn(5, 48)
    model(x).sum().backward()
    other(x).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_dynamic_asymmetric", "w4a4_static"])
def test_forward_in_training_is_near_that_in_evaluation(scheme: str) -> None:
    torch.manual_seed(0)
    model = conv_net()
    x = randn(8, 3, 8, 8)
    hb.prepare_qat_(model, SCHEMES[scheme], x)
    train(model, [x] * 3)
    hb.qat.freeze_batchnorm(model)
    hb.qat.freeze_observers(model)
    with torch.no_grad():
        training = model(x)
        model.eval()
        torch.testing.assert_close(model(x), training, rtol=0, atol=0.02)
