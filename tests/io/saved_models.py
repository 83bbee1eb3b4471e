"""Small models for the file tests: one with everything that a file has to keep."""

from pathlib import Path

import torch
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = {
    "int8_dynamic": hb.int8_dynamic(),
    "int8_weight_only": hb.int8_weight_only(),
    "int4_group": hb.int4_weight_only(16),
    "int4_symmetric": hb.int4_weight_only(16, symmetric=True),
    "int4_int8": hb.int4_int8_dynamic(16),
    "int3": hb.int_weight_only(3),
    "int5_group": hb.int_weight_only(5, 16),
    "binary": hb.int_weight_only(1),
    "ternary": hb.ternary_weight_only(),
    "nf4": hb.nf4_weight_only(16),
    "codebook": hb.codebook_weight_only((-1, -0.4, 0.1, 0.5, 1), None),
    "bf16": hb.bf16(),
    "fp16": hb.fp16(),
}


class Net(nn.Module):
    """Tied table and head, one module under two names, an LSTM, batch statistics, a buffer outside the state dict."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("angles", torch.linspace(0, 1, width).cos(), persistent=False)
        self.register_buffer("steps", torch.tensor(3))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.lstm(self.table(indices))[0] + self.angles * self.frozen
        x = self.norm(self.again(self.first(x).relu()).transpose(1, 2)).transpose(1, 2)
        return self.head(self.second(x))


def indices() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 2


def quantized_net(scheme: hb.Scheme | hb.Recipe) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    hb.quantize_(model, scheme, progress=False, on_fallback="allow")
    return model


def meta_net() -> Net:
    with torch.device("meta"):
        return Net().eval()


def save_to(folder: Path, model: nn.Module, name: str = "model.safetensors") -> Path:
    path = folder / name
    hb.save(model, path)
    return path
