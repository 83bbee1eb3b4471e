"""`hb.plan(..., tokens=...)`: what a quantization will take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from block_models import data, make
from test_streaming import skeleton, write_shards

import halfbyte as hb

SCHEME = hb.int4_weight_only(16)


def test_the_memory_it_names_is_the_least_that_is_not_refused_up_front(tmp_path: Path) -> None:
    gptq = {"algorithms": [hb.GPTQ()], "data": data(1), "progress": False}
    work = hb.plan(skeleton(), SCHEME, algorithms=[hb.GPTQ()], tokens=320).work
    assert work is not None and work.streamed_peak_bytes is not None
    for limit, message in ((work.peak_bytes - 1, "is too little: the model"), (work.peak_bytes, "running a block")):
        with pytest.raises(hb.QuantizationError, match=message):
            hb.quantize_(make(), SCHEME, max_memory=limit, **gptq)  # type: ignore[arg-type]
    source = write_shards(make(), tmp_path)
    for limit, message in (
        (work.streamed_peak_bytes - 1, "is too little: a block"),
        (work.streamed_peak_bytes, "running a block"),
    ):
        with pytest.raises(hb.QuantizationError, match=message):
            hb.quantize_checkpoint(skeleton(), source, tmp_path / "out", SCHEME, max_memory=limit, **gptq)  # type: ignore[arg-type]


def test_more_tokens_take_more_time_and_hidden_states() -> None:
    few, many = (hb.plan(make(), SCHEME, algorithms=[hb.GPTQ()], tokens=n).work for n in (10_000, 10_000_000))
    assert few is not None and many is not None
    assert many.total_seconds > 2 * few.total_seconds
    assert many.hidden_bytes == 10_000_000 * 32 * 4 * 2  # width, bytes of a float, and those of the float model
    assert many.peak_bytes == few.peak_bytes


def test_it_is_shown_and_absent_where_not_asked_for() -> None:
    made = hb.plan(make(), SCHEME, tokens=0)
    assert made.work is not None and set(made.work.seconds) == {"search"}
    assert "0 tokens: memory" in str(made) and made.to_dict()["work"] is not None
    assert hb.plan(make(), SCHEME).work is None
    with pytest.raises(ValueError, match="tokens=-1"):
        hb.plan(make(), SCHEME, tokens=-1)


def test_the_time_is_of_the_right_order() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))
        algorithms = [hb.GPTQ(error_feedback=0.0)]
        work = hb.plan(model, hb.int4_weight_only(128), algorithms=algorithms, tokens=8192).work
        batches = list(torch.randn(8, 1024, 512))
        start = time.process_time()
        hb.quantize_(model, hb.int4_weight_only(128), data=batches, algorithms=algorithms, progress=False)
        seconds = time.process_time() - start
    finally:
        torch.set_num_threads(before)
    assert work is not None
    assert seconds / 8 < work.total_seconds < 8 * seconds  # it times work on a busy machine by the clock
