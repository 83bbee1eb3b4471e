"""Modules with several weights train through their parts and evaluate as converted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from qat_models import assert_converts_to_the_same, train
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = {
    "int8_static": hb.int8_static(),
    "int8_dynamic": hb.int8_dynamic(),
    "w4a4_static": hb.int_static(4, 4),
    "int4": hb.int4_weight_only(8),
    "bf16": hb.bf16(),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """A module cannot replace itself: it needs a parent."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: object) -> object:
        return self.part(*args)


PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "lstm": (lambda: nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True), (randn(3, 5, 8),)),
    "lstm_projected": (lambda: nn.LSTM(8, 16, proj_size=8), (randn(5, 3, 8),)),
    "gru": (lambda: nn.GRU(8, 16), (randn(5, 3, 8), randn(1, 3, 16))),
    "rnn": (lambda: nn.RNN(8, 16), (randn(5, 3, 8),)),
    "lstm_cell": (lambda: nn.LSTMCell(8, 16), (randn(3, 8), (randn(3, 16), randn(3, 16)))),
    "gru_cell": (lambda: nn.GRUCell(8, 16), (randn(3, 8), randn(3, 16))),
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (randn(2, 5, 16),) * 3),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), (randn(5, 2, 16),)),
    "bilinear": (lambda: nn.Bilinear(8, 16, 4), (randn(3, 8), randn(3, 16))),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_part_evaluates_as_converted(
    part: tuple[Callable[[], nn.Module], tuple[Tensor, ...]], scheme: hb.Scheme
) -> None:
    make, inputs = part
    torch.manual_seed(0)
    model = Named(make())
    hb.prepare_qat_(model, scheme, on_fallback="allow")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, [inputs] * 3, lr=0.1)
    trained = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert {name for name in before if "weight" in name} <= set(trained)
    assert_converts_to_the_same(model, inputs)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_evaluates_as_converted(mode: str) -> None:
    torch.manual_seed(0)
    model = Named(nn.EmbeddingBag(40, 16, mode=mode))
    scheme = hb.int4_weight_only(8)
    hb.prepare_qat_(model, hb.Recipe(default=scheme, overrides={nn.EmbeddingBag: scheme}))
    inputs = (torch.arange(40), torch.tensor([0, 7, 20]))
    before = model.part.table.weight.detach().clone()
    train(model, [inputs] * 3, lr=1.0)
    assert not torch.equal(model.part.table.weight, before)
    assert_converts_to_the_same(model, inputs)


def test_packed_sequences_train_and_evaluate_as_converted() -> None:
    torch.manual_seed(0)
    model = Named(nn.LSTM(8, 16))
    packed = nn.utils.rnn.pack_sequence([randn(5, 8), randn(3, 8)])
    hb.prepare_qat_(model, hb.int8_static())
    train(model, [(packed,)] * 3, loss=lambda output: output[0].data.square().mean())
    model.eval()
    with torch.no_grad():
        expected = model(packed)[0].data
        hb.convert_(model, progress=False)
        assert torch.equal(model(packed)[0].data, expected)


def test_recurrent_weight_has_the_gradient_of_all_steps() -> None:
    """With 8-bit weights alone, gradients are near those of torch's own LSTM."""
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 16)
    x = randn(6, 3, 8)
    expected = torch.autograd.grad(lstm(x)[0].square().sum(), [lstm.weight_ih_l0, lstm.weight_hh_l0])
    model = Named(lstm)
    hb.prepare_qat_(model, hb.int8_weight_only())
    parts = [model.part.ih_l0.weight, model.part.hh_l0.weight]
    for found, wanted in zip(torch.autograd.grad(model(x)[0].square().sum(), parts), expected, strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
