"""Models of repeated blocks, and data for them, that several tests quantize block by block."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block without the attention: two projections of one input, a gate, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor, log: list[int] | None = None) -> tuple[Tensor, None]:
        if log is not None:
            log.append(1)
            assert len(log) == 1, "a block was run on arguments that an earlier run had changed"
        h = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h)) * scale, None


class Model(nn.Module):
    """Table, blocks, head; `chained=False` feeds the blocks with more than what the last one returned."""

    def __init__(self, blocks: int = 3, width: int = 32, *, chained: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 50)
        self.chained = chained

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        scale = torch.tensor(0.5)
        for layer in self.layers:
            x = layer(x if self.chained else x * 1.0, scale, log=[])[0]
        return self.head(x)


def data(seed: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (8, 10), generator=generator) for _ in range(count)]


def make(seed: int = 0, **options: object) -> Model:
    torch.manual_seed(seed)
    return Model(**options)  # type: ignore[arg-type]
