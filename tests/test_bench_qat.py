"""The training example that can be interrupted, and what the tables of docs/qat.md are made of."""

import copy
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' or the examples' folder."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(REPOSITORY / folder))
    return importlib.import_module


def test_a_ratio_is_paired(module: Any) -> None:
    ratio_of_sums = module("models.llama").ratio_of_sums
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(200, generator=generator) + 0.5  # rows differ much, the two quantities alike
    second = first * (0.8 + 0.02 * torch.randn(200, generator=generator))
    ratio, half_width = ratio_of_sums(second.tolist(), first.tolist())
    assert ratio == pytest.approx((second.sum() / first.sum()).item(), rel=1e-6)
    draws = torch.randint(200, (4000, 200), generator=generator)
    resampled = second[draws].sum(1) / first[draws].sum(1)
    assert half_width == pytest.approx(1.96 * resampled.std().item(), rel=0.1)
    assert math.isnan(ratio_of_sums([1.0], [2.0])[1])


def test_rows_of_a_distance_add_up_to_its_mean(module: Any) -> None:
    llama = module("models.llama")

    class Fixed(torch.nn.Module):
        def __init__(self, temperature: float) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / temperature)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": self.table[input_ids]})

    rows = [torch.randint(8, (length,), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 7)]
    reference = llama.log_probs(Fixed(1.0), rows)
    distance = llama.evaluate(Fixed(2.0), rows, reference)
    assert len(distance.row_kl) == 3 and all(value > 0 for value in distance.row_kl)
    assert distance.kl == pytest.approx(sum(distance.row_kl) / (4 + 8 + 6))


def test_the_tables(module: Any) -> None:
    tables = module("qat_tables")
    row = {"bits_per_weight": 2.75, "steps": 10, "mse_kl": 0.2, "trained_seconds": 3.0}
    row |= {"gptq_kl": 0.1, "gptq_kl_ci": 0.01, "trained_kl": 0.05, "trained_kl_ci": 0.01}
    row |= {"ratio_kl": 0.5, "ratio_kl_ci": 0.02}
    lines = tables.language_table({"2 bits": row}).splitlines()
    assert "| 0.1000 ± 0.0100 | 0.0500 ± 0.0100 | 0.50 ± 0.02 |" in lines[2]
    images = tables.image_table(
        {
            "a": {"model": "A", "row": "float", "top1": 90.0},
            "b": {"model": "B", "row": "float", "top1": 80.0},
            "c": {"model": "B", "row": "trained, seed 0", "top1": 70.125},
        }
    ).splitlines()
    assert [cell.strip() for cell in images[2].split("|")[1:-1]] == ["float", "90.00 %", "80.00 %"]
    assert [cell.strip() for cell in images[3].split("|")[1:-1]] == ["trained, seed 0", "", "70.12 %"]
    steps = tables.step_table(
        {
            "a": {"model": "A", "step": "float", "ms": 10.0, "times_float": 1.0, "over_float_mb": 0.0},
            "b": {"model": "A", "step": "8 bits", "ms": 12.5, "times_float": 1.25, "over_float_mb": 0.3},
        }
    ).splitlines()
    assert [cell.strip() for cell in steps[2].split("|")[1:-1]] == ["A", "float", "10", "1.00", ""]
    assert [cell.strip() for cell in steps[3].split("|")[1:-1]] == ["", "8 bits", "12", "1.25", "0.3"]


def test_interrupted_training_goes_on_to_the_same_bits(module: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    example = module("qat_language_model")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    data = torch.randint(32, (16, 8))
    recipe = hb.Recipe(default=hb.int_weight_only(2, 32), overrides={"lm_head": None, "model.embed_tokens": None})
    prepared = hb.prepare_qat_(copy.deepcopy(teacher), recipe, weights="learned", on_fallback="allow")

    def train(student: torch.nn.Module, checkpoint: Path | None) -> torch.Tensor:
        example.distill(student, teacher, data, steps=8, batch=2, rate=1e-2, checkpoint=checkpoint, every=3)
        return student(input_ids=data, use_cache=False).logits

    straight = train(copy.deepcopy(prepared), None)
    assert not torch.equal(straight, prepared.eval()(input_ids=data, use_cache=False).logits)

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    calls: list[int] = []
    interrupted = copy.deepcopy(prepared)
    interrupted.register_forward_pre_hook(interrupt)
    checkpoint = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, checkpoint)
    assert torch.load(checkpoint)["step"] == 3
    assert torch.equal(train(copy.deepcopy(prepared), checkpoint), straight)
