"""embedding_weight_only in both layouts against the dequantized table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_weights import RandomWeight, random_weight
from torch import Tensor

import halfbyte as hb


def gather(indices: Tensor, w: RandomWeight, tiled: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, dim = w.dense.shape
    qweight, scale, zero_point = w.qweight, w.scale, w.zero_point
    if not tiled:
        qweight = hb.ops.pack(w.codes, w.bits)
        scale = scale.t().contiguous()
        zero_point = None if zero_point is None else zero_point.t().contiguous()
    return hb.ops.embedding_weight_only(
        indices,
        qweight,
        scale,
        zero_point,
        bits=w.bits,
        num_embeddings=rows,
        embedding_dim=dim,
        group_size=w.group_size,
        tiled=tiled,
        dtype=dtype,
    )


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 40),
    zero_points=st.booleans(),
    tiled=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_are_those_of_the_table(
    bits: int, rows: int, groups: int, group_size: int, zero_points: bool, tiled: bool, scale_dtype: torch.dtype
) -> None:
    w = random_weight(
        rows, groups * group_size, bits, group_size=group_size, zero_points=zero_points, scale_dtype=scale_dtype
    )
    indices = torch.randint(0, rows, (3, 4))
    assert torch.equal(gather(indices, w, tiled), w.dense.float()[indices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiled", [False, True])
def test_half_output_is_rounded_once(dtype: torch.dtype, tiled: bool) -> None:
    w = random_weight(20, 64, 8)
    indices = torch.arange(20, dtype=torch.int32)
    y = gather(indices, w, tiled, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, w.dense.float().to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5, 1, 2)])
def test_indices_of_any_shape(shape: tuple[int, ...]) -> None:
    w = random_weight(9, 32, 4)
    assert gather(torch.zeros(shape, dtype=torch.int64), w, False).shape == (*shape, 32)


def test_many_rows_use_all_threads_and_stay_in_order() -> None:
    w = random_weight(500, 64, 4)
    indices = torch.randint(0, 500, (4000,))
    assert torch.equal(gather(indices, w, False), w.dense.float()[indices])


def test_non_contiguous_indices() -> None:
    w = random_weight(30, 32, 4)
    indices = torch.randint(0, 30, (6, 4)).t()
    assert torch.equal(gather(indices, w, True), w.dense.float()[indices])


@pytest.mark.parametrize("index", [-1, 9, 2**40])
@pytest.mark.parametrize("tiled", [False, True])
def test_index_outside_the_table_is_named(index: int, tiled: bool) -> None:
    w = random_weight(9, 32, 4)
    with pytest.raises(IndexError, match=f"index {index} .*num_embeddings=9"):
        gather(torch.tensor([3, index]), w, tiled)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"indices": torch.tensor([0.0])}, TypeError, "indices has dtype torch.float32"),
        ({"embedding_dim": 30}, ValueError, "embedding_dim=30"),
        ({"scale": torch.ones(1, 9)}, ValueError, "scale has shape"),
        ({"zero_point": torch.ones(9, 1)}, TypeError, "zero_point has dtype"),
        ({"dtype": torch.float64}, TypeError, "dtype=torch.float64"),
        ({"bits": 0}, ValueError, "bits=0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {
        "indices": torch.tensor([0]),
        "qweight": hb.ops.pack(torch.zeros(9, 32, dtype=torch.int8), 4),
        "scale": torch.ones(9, 1),
        "bits": 4,
        "num_embeddings": 9,
        "embedding_dim": 32,
    }
    with pytest.raises(error, match=words):
        hb.ops.embedding_weight_only(**(arguments | change))  # type: ignore[arg-type]


def test_opcheck() -> None:
    op = torch.ops.halfbyte.embedding_weight_only.default
    qweight = hb.ops.pack(torch.zeros(9, 32, dtype=torch.int8), 4)
    torch.library.opcheck(
        op, (torch.tensor([[1, 2]]), qweight, torch.ones(9, 1), None, 4, 9, 32, 32, False, torch.float32)
    )


def test_compile_with_dynamic_shapes() -> None:
    w = random_weight(9, 32, 4)
    compiled = torch.compile(lambda i: gather(i, w, True) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (2, 5):
        indices = torch.randint(0, 9, (count,))
        assert torch.equal(compiled(indices), gather(indices, w, True) * 2)
