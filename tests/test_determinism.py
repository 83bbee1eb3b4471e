"""Same inputs, same file bytes: across runs and thread counts, and for searched scales across ISA levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_models import Model

import halfbyte as hb
from halfbyte._extension import available_capabilities, set_cpu_capability


def file_bytes(path: Path, algorithm: object, scheme: hb.Scheme, threads: int) -> bytes:
    """The file of a model wide enough for torch to use several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = Model(blocks=2, width=256)
        batches = [torch.randint(0, 50, (4, 128), generator=torch.Generator().manual_seed(1)) for _ in range(3)]
        needs_data = isinstance(algorithm, hb.GPTQ | hb.AWQ)
        hb.quantize_(
            model,
            scheme,
            data=batches if needs_data else None,
            algorithms=[algorithm],  # type: ignore[list-item]
            progress=False,
            on_fallback="allow",
        )
        hb.save(model, path)
    finally:
        torch.set_num_threads(before)
    return path.read_bytes()


@pytest.mark.parametrize("algorithm", [hb.GPTQ(), hb.GPTQ(error_feedback=0.0, polish=0), hb.AWQ(tokens=128)])
def test_algorithms_with_data_give_the_same_file_for_every_number_of_threads(tmp_path: Path, algorithm: object) -> None:
    files = [file_bytes(tmp_path / "f", algorithm, hb.int4_weight_only(64), threads) for threads in (1, 1, 2, 4)]
    assert all(other == files[0] for other in files)


@pytest.mark.parametrize("algorithm", [hb.algorithms.RTN(), hb.MSE()])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scales_without_data_give_the_same_file_on_every_level(
    tmp_path: Path, algorithm: object, bits: int, restore_level: None
) -> None:
    files = []
    for level in available_capabilities():
        set_cpu_capability(level)
        files += [file_bytes(tmp_path / "f", algorithm, hb.int_weight_only(bits, 64), n) for n in (1, 3)]
    assert all(other == files[0] for other in files)
