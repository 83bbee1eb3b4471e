"""What any user does with a model, for every module with parts: copy it, pickle it, compile it, export it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb

MODULES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "LSTMCell": (nn.LSTMCell(32, 32), (torch.randn(2, 32),)),
    "GRUCell": (nn.GRUCell(32, 32), (torch.randn(2, 32),)),
    "RNNCell": (nn.RNNCell(32, 32), (torch.randn(2, 32),)),
    "Bilinear": (nn.Bilinear(16, 32, 8), (torch.randn(5, 16), torch.randn(5, 32))),
    "MultiheadAttention": (nn.MultiheadAttention(32, 4), (torch.randn(5, 2, 32),) * 3),
    "TransformerDecoderLayer": (nn.TransformerDecoderLayer(32, 4, 64), (torch.randn(5, 2, 32), torch.randn(7, 2, 32))),
    "Embedding": (nn.Embedding(50, 32), (torch.randint(0, 50, (3, 4)),)),
    "EmbeddingBag": (nn.EmbeddingBag(50, 32), (torch.randint(0, 50, (3, 4)),)),
}


def tensors(output: object) -> list[Tensor]:
    if isinstance(output, tuple):
        return [tensor for part in output for tensor in tensors(part)]
    return [output] if isinstance(output, Tensor) else []


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_copies_and_graphs_compute_the_same(name: str) -> None:
    module, inputs = MODULES[name]
    model = nn.ModuleDict({"m": copy.deepcopy(module).eval()})
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    quantized = model["m"]
    expected = tensors(quantized(*inputs))
    others = (
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
        torch.compile(quantized, backend="aot_eager", fullgraph=True),
        torch.export.export(quantized, inputs).module(),
    )
    for other in others:
        for result, wanted in zip(tensors(other(*inputs)), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-6)
