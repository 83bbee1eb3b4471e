"""Finding where scales fold: known places in models of many shapes, reasons where there are none, and the proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.algorithms.transform import _small_example
from halfbyte.edits import WeightEdits
from halfbyte.errors import QuantizationError
from halfbyte.folds import Consumer, Example, Fold
from halfbyte.probing import find_folds

WIDTH = 32


class RootMeanSquare(nn.Module):
    """An RMSNorm of one's own; `less_one` stores gains less one, as some models do."""

    def __init__(self, width: int, less_one: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width) + 0.5 - float(less_one))
        self.less_one = less_one

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gamma + 1 if self.less_one else self.gamma
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


class Attention(nn.Module):
    """Causal attention in which pairs of heads share keys and values."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.size = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A transformer block: norms before attention and before a gated feed-forward, residual connections."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attention = Attention(WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Table, blocks, norm, head."""

    def __init__(self, norm: Callable[[int], nn.Module], *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def decoder(norm: Callable[[int], nn.Module] = nn.LayerNorm, **options: bool) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(norm, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


TOKENS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def search(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, Fold], dict[str, str]]:
    folds, failed = find_folds(model, lambda: model(*inputs))
    return {fold.producer: fold for fold in folds}, {no.producer: no.reason for no in failed}


def names(fold: Fold) -> list[str]:
    return [consumer.name for consumer in fold.consumers]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "own": RootMeanSquare,
    "own, less one": lambda width: RootMeanSquare(width, less_one=True),
}


@pytest.mark.parametrize("norm", NORMS)
def test_every_fold_of_a_decoder_is_found_and_leaves_it_unchanged(norm: str) -> None:
    model = decoder(NORMS[norm])
    folds, failed = search(model, TOKENS)
    expected = {"norm": ["head"]}
    for block in ("blocks.0.", "blocks.1."):
        expected[block + "norm1"] = [block + f"attention.{part}" for part in "qkv"]
        expected[block + "norm2"] = [block + "gate", block + "up"]
        expected[block + "attention.v"] = [block + "attention.o"]
        expected[block + "up"] = [block + "down"]
    assert {name: names(fold) for name, fold in folds.items()} == expected
    assert "does not scale with it" in failed["blocks.0.gate"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        example = Example(lambda: model(TOKENS))
        edits = WeightEdits(0)
        for fold in folds.values():
            change, reason = example.prove(fold.apply(model, torch.rand(fold.channels) * 4 + 0.1, edits))
            assert change < 1e-5 and not reason
        assert not torch.equal(model.blocks[0].up.weight, before["blocks.0.up.weight"])  # type: ignore[union-attr, arg-type]
        edits.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_heads_that_share_values_read_the_same_channels() -> None:
    folds, _ = search(decoder(), TOKENS)
    channel_of = folds["blocks.0.attention.v"].consumers[0].channel_of
    head = torch.arange(8)
    assert torch.equal(channel_of, torch.cat([head, head, head + 8, head + 8]))


def test_layers_that_get_one_tensor_are_known_to() -> None:
    folds, _ = search(decoder(), TOKENS)
    consumers = folds["blocks.1.norm1"].consumers
    assert {c.same_input_as for c in consumers} == {"blocks.1.attention.q"}


def test_probing_leaves_forwards_and_weights_alone() -> None:
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search(model, TOKENS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folds_are_found_in_16_bits(dtype: torch.dtype) -> None:
    folds, _ = search(decoder().to(dtype), TOKENS)
    assert len(folds) == 9


def test_a_tied_head_is_no_consumer() -> None:
    folds, failed = search(decoder(tied=True), TOKENS)
    assert "norm" not in folds
    assert failed["norm"] == "the weight of head is shared with embed"


class Sentence(nn.Module):
    """The norm comes after the residual connection, which reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(x + self.second(torch.relu(self.first(x))))


def test_a_norm_that_a_residual_connection_reads_stays() -> None:
    folds, failed = search(Sentence(), torch.randn(5, WIDTH))
    assert list(folds) == ["first"]  # through ReLU
    assert failed["norm"] == failed["last"] == "the model's output reads it past linear layers"


def test_channels_that_are_zero_on_the_example_follow_the_others() -> None:
    model = Sentence()
    with torch.no_grad():
        model.first.bias[::3] = -100.0  # never past the ReLU
    folds, _ = search(model, torch.randn(5, WIDTH))
    assert torch.equal(folds["first"].consumers[0].channel_of, torch.arange(WIDTH))


class Routed(nn.Module):
    """One of two experts runs, by a rule that the example may not exercise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(2))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](self.norm(x))


def test_a_layer_that_did_not_run_stops_a_fold() -> None:
    _, failed = search(Routed(), torch.randn(4, WIDTH), 1)  # type: ignore[arg-type]
    assert failed["norm"] == "experts.0, which may read it, did not run on the example"


class Shared(nn.Module):
    """One layer reads two different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.layer = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.a(x)) + self.layer(self.b(x))


def test_a_layer_that_reads_two_norms_stops_both() -> None:
    folds, failed = search(Shared(), torch.randn(4, WIDTH))
    assert not folds
    assert "some of the times" in failed["a"] and "some of the times" in failed["b"]


def test_a_fold_that_is_none_is_undone() -> None:
    model = decoder()
    before = model.blocks[0].norm1.weight.clone()  # type: ignore[union-attr, operator]
    wrong = Fold("blocks.0.norm1", WIDTH, (Consumer("blocks.0.attention.q", torch.arange(WIDTH), ""),), {"weight": 0.0})
    with torch.no_grad():
        example = Example(lambda: model(TOKENS))
        change, reason = example.prove(wrong.apply(model, torch.full((WIDTH,), 2.0), WeightEdits(0)))
    assert change > 1e-3 and "undone" in reason
    assert torch.equal(model.blocks[0].norm1.weight, before)  # type: ignore[union-attr, arg-type]


def test_outputs_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(QuantizationError, match="NaN or inf"):
        search(nn.Sequential(nn.Linear(4, 4)), torch.full((1, 4), torch.nan))


def test_the_example_is_one_row_cut_short_if_the_model_takes_that() -> None:
    seen: list[tuple[int, ...]] = []

    def run(batch: object) -> Tensor:
        assert isinstance(batch, dict)
        seen.append(tuple(batch["ids"].shape))
        return torch.ones(1)

    _small_example(run, {"ids": torch.ones(8, 100, dtype=torch.int64), "mask": torch.ones(8, 100, dtype=torch.int64)})
    assert seen == [(1, 32)]

    def picky(batch: object) -> Tensor:
        if len(batch) != 8:  # type: ignore[arg-type]
            raise ValueError("only whole batches")
        return torch.ones(1)

    _small_example(picky, torch.ones(8, 4))


def test_parts_of_an_attention_block_fold() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 48, norm_first=True, batch_first=True), 2).eval()
    batches = [torch.randn(4, 10, WIDTH) for _ in range(2)]
    report = hb.quantize_(
        model, hb.int8_dynamic(), data=batches, algorithms=[hb.SmoothQuant(alpha=0.5)], progress=False
    )
    done = {r.producer: list(r.consumers) for r in report.transforms if not r.reason}
    assert len(done) == 8, report.transforms
    assert any("out_proj" in consumer for consumers in done.values() for consumer in consumers)
