"""A real sentence encoder: ranking of sentence pairs by people, before and after quantization."""

import copy
from pathlib import Path

import pytest
from benchmarks.models import minilm, reload
from benchmarks.models.variants import VARIANTS
from torch import Tensor

import halfbyte as hb


class Subject:
    """The float encoder, pairs, and its score on them."""

    def __init__(self, root: Path) -> None:
        self.model = minilm.load_float(root)
        self.pairs = minilm.load_pairs(root, 600)
        self.batches: list[dict[str, Tensor]] = [inputs for _, inputs in minilm.batches(self.pairs, batch=16)]
        self.spearman, _ = minilm.score(minilm.embed(self.model, self.pairs), self.pairs)

    def quantized(self, variant: str) -> minilm.BertModel:
        model = copy.deepcopy(self.model)
        VARIANTS[variant].quantize_(model, self.batches[::10])
        return model


@pytest.fixture(scope="module")
def encoder(shared_data: Path) -> Subject:
    return Subject(shared_data)


@pytest.mark.parametrize(
    ("variant", "bound"), [("int8_weight_only", 0.001), ("int8_dynamic", 0.003), ("int4 g32, MSE", 0.01)]
)
def test_rank_correlation_stays_within_its_bound(encoder: Subject, variant: str, bound: float) -> None:
    spearman, _ = minilm.score(minilm.embed(encoder.quantized(variant), encoder.pairs), encoder.pairs)
    assert abs(spearman - encoder.spearman) < bound


def test_reloads_to_the_same_bits_in_a_new_process(encoder: Subject, tmp_path: Path) -> None:
    model = encoder.quantized("int8_dynamic")
    hb.save(model, tmp_path / "model.safetensors")
    reload.save_expected(model, encoder.batches[20], tmp_path / "expected.safetensors")
    assert reload.same_in_new_process(
        "minilm", [(tmp_path / "model.safetensors", tmp_path / "expected.safetensors")]
    ) == [True]


def test_encoder_on_pytorchs_own_layers_keeps_its_rank_correlation(encoder: Subject, shared_data: Path) -> None:
    model = minilm.load_torch(shared_data)
    ids, mask = (encoder.batches[20][name] for name in ("input_ids", "attention_mask"))
    expected = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask.bool()
    assert (model(ids, mask).last_hidden_state[kept] - expected[kept]).abs().max().item() < 1e-4
    report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert isinstance(model.encoder.layers[0].self_attn, hb.nn.QuantizedMultiheadAttention)
    assert report.bytes_after < report.bytes_before / 3.5
    spearman, _ = minilm.score(minilm.embed(model, encoder.pairs), encoder.pairs)
    assert abs(spearman - encoder.spearman) < 0.003


def test_int8_scores_and_values_keep_the_rank_correlation(encoder: Subject, shared_data: Path) -> None:
    model = minilm.load_torch(shared_data)
    hb.quantize_(model, hb.int8_attention(hb.int8_dynamic()), progress=False)
    assert model.encoder.layers[0].self_attn.int8_products
    spearman, _ = minilm.score(minilm.embed(model, encoder.pairs), encoder.pairs)
    assert abs(spearman - encoder.spearman) < 0.003
