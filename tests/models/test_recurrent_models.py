"""Real recurrent models: character LSTMs on real text, a voice activity detector on a minute of speech."""

import copy
from pathlib import Path

import pytest
from benchmarks.models import charrnn, silero
from torch import Tensor, nn

import halfbyte as hb

FLOAT_BITS = {"charrnn_shakespeare": 2.0315, "charrnn_h256": 3.1960}


@pytest.mark.parametrize("name", FLOAT_BITS)
def test_character_models_keep_their_bits_per_character(name: str, shared_data: Path) -> None:
    model, rows = charrnn.load_float(shared_data, name), charrnn.load_rows(shared_data, name)
    before = charrnn.bits_per_character(model, rows)
    assert before == pytest.approx(FLOAT_BITS[name], abs=1e-3)
    some = rows[:128]
    before = charrnn.bits_per_character(model, some)
    for scheme, algorithms, bound in (
        (hb.int8_dynamic(), [], 0.01),
        (hb.int4_weight_only(32), [hb.MSE()], 0.11),
        (hb.int4_weight_only(32), [hb.MSE(), hb.algorithms.BiasCorrection()], 0.05),
        (hb.int4_int8_dynamic(32), [hb.MSE(), hb.algorithms.BiasCorrection()], 0.05),
        (hb.int4_weight_only(32), [hb.algorithms.GPTQ()], 0.05),
    ):
        quantized = copy.deepcopy(model)
        data = [rows[-32:, :128]] if any(algorithm.needs_data for algorithm in algorithms) else None
        report = hb.quantize_(quantized, scheme, data, algorithms, progress=False)
        assert isinstance(quantized.lstm, hb.nn.QuantizedLSTM)
        assert report.bytes_after < report.bytes_before / 3
        assert abs(charrnn.bits_per_character(quantized, some) - before) < bound, (scheme, algorithms)


def test_voice_activity_is_decided_as_before(shared_data: Path) -> None:
    model, chunks = silero.load_float(shared_data), silero.load_chunks(shared_data)
    expected = silero.load_expected(shared_data)
    assert (silero.probabilities(model, chunks) - expected).abs().max().item() < 1e-5

    def forward(model: silero.VoiceActivity, batch: Tensor) -> None:
        silero.probabilities(model, batch)

    asymmetric = hb.int8_dynamic(symmetric=False)
    cases = (
        (hb.int8_dynamic(), [], None, 0.03),
        (hb.int8_dynamic(), [hb.algorithms.GPTQ()], None, 0.02),
        (asymmetric, [], None, 0.02),
        (asymmetric, [], hb.fp16(), 0.02),  # the recipe of the guide
    )
    for scheme, algorithms, convolutions, bound in cases:
        quantized = copy.deepcopy(model)
        # Calibrated on the last 400 chunks, measured on those before.
        data, measured = ([chunks[-400:]], len(chunks) - 400) if algorithms else (None, len(chunks))
        # The spectrum that conv1 reads spans more than 8 bits.
        recipe = hb.Recipe(default=scheme, overrides={nn.Conv1d: convolutions})
        hb.quantize_(quantized, recipe, data, algorithms, progress=False, forward=forward)
        assert isinstance(quantized.lstm_cell, hb.nn.QuantizedLSTMCell)
        after, before = silero.probabilities(quantized, chunks)[:measured], expected[:measured]
        assert (after - before).abs().max().item() < bound
        assert ((after > 0.5) == (before > 0.5)).float().mean().item() >= 0.995
