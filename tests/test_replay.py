"""Outputs of layers that will not change any more are handed out again instead of being computed."""

from __future__ import annotations

import pytest
import torch
from block_models import data, make
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import section
from halfbyte.replay import Replay


class Counted(nn.Linear):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = Counted(8, 8), Counted(8, 8)
        self.runs = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.runs += 1
        return self.o(self.q(x).tanh()), None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(x)[0]
        h += x  # in place: what was kept must not change
        return h + self.down(self.up(h).relu())


ORDER = ["attention.q", "attention.o", "up", "down"]


def test_settled_modules_run_once_a_batch_and_give_what_they_gave() -> None:
    block, batches = Block(), [torch.randn(3, 8) for _ in range(2)]
    replay, runs = Replay(block, ORDER, 1 << 20), []
    with torch.no_grad():
        wanted = [block(x) for x in batches]
        for settled in ([], ["attention.q"], ["attention.o"], ["up"], ["down"]):
            replay.settle(settled)
            block.attention.runs = block.attention.q.runs = 0
            for _ in range(2):
                for index, x in enumerate(batches):
                    with replay.running(index):
                        assert torch.equal(block(x), wanted[index])
            runs.append((block.attention.runs, block.attention.q.runs))
    assert runs == [(4, 4), (4, 2), (2, 0), (0, 0), (0, 0)]
    assert "forward" not in vars(block.attention)


def test_a_module_is_not_settled_before_what_runs_ahead_of_it() -> None:
    block, x = Block(), torch.randn(3, 8)
    replay = Replay(block, ORDER, 1 << 20)
    replay.settle(["up"])  # as where it shares its input with q
    with torch.no_grad():
        for change in (0.0, 1.0):
            block.attention.o.bias += change
            wanted = block(x)
            with replay.running(0):
                assert torch.equal(block(x), wanted)


def test_no_room_and_odd_outputs_are_computed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.inner(x)}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(x)["y"] + self.odd(2 * x)["y"]

    x = torch.randn(3, 8)
    for module, order, room in ((Block(), ORDER, 0), (Outer(), ["odd.inner"], 1 << 20)):
        replay = Replay(module, order, room)
        replay.settle(order)
        with torch.no_grad():
            for _ in range(3):
                with replay.running(0):
                    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("chained", [True, False])
def test_the_integers_are_those_without(chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (1 << 30, 1 << 14, 0):
        monkeypatch.setattr(section, "_REPLAY_BYTES", room)
        model = make(chained=chained)
        hb.quantize_(model, hb.int_weight_only(3, 16), data=data(1), algorithms=[hb.GPTQ()], progress=False)
        found.append(model.state_dict())
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
