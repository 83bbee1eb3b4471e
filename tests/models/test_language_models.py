"""Every scheme on real language models: perplexity, generation, files, ties.

stories260K is small enough for every scheme; the bounds that the project promises are checked on novels5M.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks.models import llama, reload
from benchmarks.models.variants import VARIANTS
from torch import Tensor
from transformers import LlamaForCausalLM

import halfbyte as hb

STORIES = "stories260K"
# Largest relative change of perplexity on 16 stories. Two bits and less break a model that was not trained for it.
BOUNDS = {
    "bf16": 0.003,
    "int8_weight_only": 0.003,
    "int8_dynamic": 0.008,
    "int4 g32, min/max": 0.15,
    "int4 g32, MSE": 0.12,
    "int4 g32, MSE + data": 0.12,
    "NF4 g32, absmax": 0.15,
    "NF4 g32, MSE": 0.12,
    "NF4 g32, GPTQ": 0.1,
    "FP4 g32, MSE": 0.12,
    "W4A8 g32, MSE": 0.12,
    "int3 g32, MSE": 0.6,
}


class Subject:
    """A float model with rows of its text and its log-probabilities for them."""

    def __init__(self, root: Path, name: str, rows: int) -> None:
        self.model = llama.load_float(root, name)
        self.text = llama.load_text(root, name, rows=rows, calibration_rows=16)
        self.reference = llama.log_probs(self.model, self.text.evaluation)

    def quantized(self, variant: str) -> LlamaForCausalLM:
        model = copy.deepcopy(self.model)
        VARIANTS[variant].quantize_(model, [row[None] for row in self.text.calibration])
        return model

    def distance(self, model: torch.nn.Module) -> llama.Distance:
        return llama.evaluate(model, self.text.evaluation, self.reference)

    def layer_errors(self, variant: str) -> dict[str, float]:
        """Relative squared error of each quantized layer's output, its inputs being those of the float model."""
        quantized = self.quantized(variant)
        errors: dict[str, float] = {}

        def compare(name: str) -> Callable[[torch.nn.Module, tuple[Tensor], Tensor], None]:
            def hook(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
                ours = torch.nn.functional.linear(args[0], quantized.get_submodule(name).dequantize())
                errors[name] = ((ours - output).square().sum() / output.square().sum()).item()

            return hook

        handles = [
            module.register_forward_hook(compare(name))
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        llama.log_probs(self.model, self.text.evaluation[:8])
        for handle in handles:
            handle.remove()
        return errors


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Subject:
    return Subject(shared_data, STORIES, rows=16)


@pytest.fixture(scope="module")
def novels(shared_data: Path) -> Subject:
    return Subject(shared_data, "novels5M", rows=32)


@pytest.fixture(scope="module")
def quantized_stories(stories: Subject) -> Callable[[str], LlamaForCausalLM]:
    return functools.cache(stories.quantized)


@pytest.mark.parametrize("variant", BOUNDS)
def test_perplexity_stays_within_its_bound(
    stories: Subject, quantized_stories: Callable[[str], torch.nn.Module], variant: str
) -> None:
    assert abs(stories.distance(quantized_stories(variant)).perplexity_change) < BOUNDS[variant]


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(BOUNDS)))
def test_very_low_bits_give_finite_logits(
    stories: Subject, quantized_stories: Callable[[str], torch.nn.Module], variant: str
) -> None:
    distance = stories.distance(quantized_stories(variant))
    assert 1.0 < distance.perplexity < float("inf")
    assert distance.kl > 0.0


def test_distance_grows_as_bits_shrink(stories: Subject, quantized_stories: Callable[[str], torch.nn.Module]) -> None:
    order = ["int8_weight_only", "int8_dynamic", "int4 g32, MSE", "int3 g32, MSE", "int2 g32, MSE", "binary g32"]
    kl = [stories.distance(quantized_stories(variant)).kl for variant in order]
    assert kl == sorted(kl)


@pytest.mark.parametrize("variant", ["int8_weight_only", "int8_dynamic", "int4 g32, MSE", "W4A8 g32, MSE"])
def test_generate_works_unchanged(
    stories: Subject, quantized_stories: Callable[[str], LlamaForCausalLM], variant: str
) -> None:
    text = llama.greedy(quantized_stories(variant), stories.text, new_tokens=24)
    assert text.startswith("Once upon a time")


def test_int8_continues_a_story_as_float_does(
    stories: Subject, quantized_stories: Callable[[str], LlamaForCausalLM]
) -> None:
    ours = llama.greedy(quantized_stories("int8_weight_only"), stories.text, new_tokens=32)
    assert ours == llama.greedy(stories.model, stories.text, new_tokens=32)


def test_a_row_gives_the_same_bits_alone_and_in_a_batch_of_its_length(
    stories: Subject, quantized_stories: Callable[[str], torch.nn.Module]
) -> None:
    hidden = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for variant in ("int8_weight_only", "int8_dynamic", "int4 g32, MSE", "W4A8 g32, MSE"):
        layer = quantized_stories(variant).get_submodule("model.layers.0.self_attn.q_proj")
        assert torch.equal(layer(hidden), torch.cat([layer(row[None]) for row in hidden])), variant


def test_all_variants_reload_to_the_same_bits_in_a_new_process(
    stories: Subject, quantized_stories: Callable[[str], torch.nn.Module], tmp_path: Path
) -> None:
    inputs: dict[str, Tensor] = {"input_ids": stories.text.evaluation[0][None]}
    files = []
    for index, variant in enumerate(VARIANTS):
        files.append((tmp_path / f"{index}.safetensors", tmp_path / f"{index}.expected.safetensors"))
        hb.save(quantized_stories(variant), files[-1][0])
        reload.save_expected(quantized_stories(variant), inputs, files[-1][1])
    same = dict(zip(VARIANTS, reload.same_in_new_process(STORIES, files), strict=True))
    assert [variant for variant, equal in same.items() if not equal] == []


def _shares_storage(model: torch.nn.Module) -> bool:
    head, table = model.get_submodule("lm_head"), model.get_submodule("model.embed_tokens")
    return head.qweight.data_ptr() == table.qweight.data_ptr() and head.scale.data_ptr() == table.scale.data_ptr()


def test_tied_table_and_head_share_one_packed_tensor_also_after_reloading(
    shared_data: Path, quantized_stories: Callable[[str], torch.nn.Module], tmp_path: Path
) -> None:
    model = quantized_stories("int4 g32, MSE")
    assert _shares_storage(model)
    hb.save(model, tmp_path / "model.safetensors")
    reloaded = llama.skeleton(shared_data, STORIES)
    hb.load_(reloaded, tmp_path / "model.safetensors")
    assert _shares_storage(reloaded)
    assert _shares_storage(copy.deepcopy(model))


def test_report_counts_the_bytes_that_the_file_holds(stories: Subject, tmp_path: Path) -> None:
    model = copy.deepcopy(stories.model)
    report = VARIANTS["int4 g32, MSE"].quantize_(model, [])
    hb.save(model, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert report.bytes_after <= size < report.bytes_after + 60_000  # the header: names, digests, the quantization map


@pytest.mark.parametrize(("variant", "bound"), [("int8_weight_only", 0.001), ("int8_dynamic", 0.005)])
def test_novels_perplexity_is_within_the_promise(novels: Subject, variant: str, bound: float) -> None:
    assert abs(novels.distance(novels.quantized(variant)).perplexity_change) < bound


def test_mse_scales_beat_min_max_at_four_bits(novels: Subject) -> None:
    min_max = novels.distance(novels.quantized("int4 g32, min/max"))
    mse = novels.distance(novels.quantized("int4 g32, MSE"))
    assert mse.kl < min_max.kl
    # A simulation in plain PyTorch, with float16 scales and no other code of ours, gave 7.2e-3 and 6.9e-3.
    assert min_max.kl == pytest.approx(7.2e-3, rel=0.1)
    assert mse.kl < 7.1e-3


def test_nf4_with_searched_scales_is_as_near_as_asymmetric_int4(novels: Subject) -> None:
    absmax, mse, int4 = (
        novels.distance(novels.quantized(v)).kl for v in ("NF4 g32, absmax", "NF4 g32, MSE", "int4 g32, MSE")
    )
    assert mse < 0.9 * absmax
    assert mse < 1.05 * int4  # with a quarter of a bit a weight less: no zero points


def test_data_weighting_lowers_the_output_error_of_layers_on_unseen_text(novels: Subject) -> None:
    plain, weighted = novels.layer_errors("int4 g32, MSE"), novels.layer_errors("int4 g32, MSE + data")
    better = [weighted[name] < plain[name] for name in plain if name != "lm_head"]
    assert sum(better) > 0.8 * len(better)
    assert sum(weighted.values()) < 0.97 * sum(plain.values())
