"""EmbeddingBag from packed rows: PyTorch's own on the dequantized table is the oracle."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = [
    *(hb.int_weight_only(bits) for bits in range(1, 9)),
    hb.int8_weight_only(),
    hb.int4_weight_only(32),
    hb.int4_weight_only(16),  # groups that do not fill vectors
    hb.int_weight_only(2, 64, symmetric=True),
    hb.int_weight_only(8, 12),
]
INDICES = torch.tensor([3, 49, 0, 0, 7, 3, 12, 1, 2, 48, 3])
OFFSETS = torch.tensor([0, 4, 4, 9])


def quantized_bag(scheme: hb.Scheme, width: int = 96, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(50, width, **settings)})
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"bag": scheme})
    hb.quantize_(model, recipe, progress=False, on_fallback="allow")
    return model["bag"]


@pytest.mark.parametrize("width", [1, 31, 96, 130, 300])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sum_is_that_of_the_dequantized_rows_on_every_level(scheme: hb.Scheme, width: int, restore_level: None) -> None:
    bag = quantized_bag(scheme, width, mode="sum")
    expected = F.embedding_bag(INDICES, bag.table.dequantize(), OFFSETS, mode="sum")
    results = []
    for level in hb.available_capabilities():
        hb._extension.set_cpu_capability(level)
        results.append(bag(INDICES, OFFSETS))
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("scheme", [hb.int8_weight_only(), hb.int4_weight_only(32), hb.int_weight_only(3)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_modes_padding_and_offsets(
    mode: str, padding_idx: int | None, include_last_offset: bool, scheme: hb.Scheme, index_dtype: torch.dtype
) -> None:
    settings = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    bag = quantized_bag(scheme, **settings)
    offsets = torch.tensor([0, 4, 4, 9, 11 if include_last_offset else 10]).to(index_dtype)
    indices = INDICES.to(index_dtype)
    expected = F.embedding_bag(indices, bag.table.dequantize(), offsets, **settings)
    torch.testing.assert_close(bag(indices, offsets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [hb.int8_weight_only(), hb.int4_weight_only(32), hb.bf16()], ids=str)
def test_matrix_of_bags_with_weights(scheme: hb.Scheme) -> None:
    bag = quantized_bag(scheme, mode="sum")
    indices, weights = torch.randint(0, 50, (5, 7)), torch.randn(5, 7)
    table = bag.table.weight.float()
    expected = F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
    tolerance = 0.05 if scheme == hb.bf16() else 1e-5
    torch.testing.assert_close(bag(indices, per_sample_weights=weights), expected, rtol=tolerance, atol=tolerance)
    equal_weights = torch.full((5, 7), 2.0)
    torch.testing.assert_close(bag(indices, per_sample_weights=equal_weights), 2 * bag(indices), rtol=0.01, atol=0.05)


def test_bag_of_many_rows_and_threads(restore_threads: None) -> None:
    bag = quantized_bag(hb.int4_weight_only(32), mode="mean")
    indices = torch.randint(0, 50, (6000,))
    offsets = torch.tensor([0, 3, 5000])
    expected = F.embedding_bag(indices, bag.table.dequantize().double(), offsets, mode="mean")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(bag(indices, offsets))
    torch.testing.assert_close(results[0], expected.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_table_gives_half_output(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(50, 64, dtype=dtype)})
    expected = model["bag"](INDICES, OFFSETS)
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    y = model["bag"](INDICES, OFFSETS)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_table_tied_to_an_output_layer_is_read_in_its_layout() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(50, 64, mode="sum"), "head": nn.Linear(64, 50, bias=False)})
    model["head"].weight = model["bag"].weight
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert model["bag"].table.qweight is model["head"].qweight
    expected = F.embedding_bag(INDICES, model["head"].dequantize(), OFFSETS, mode="sum")
    torch.testing.assert_close(model["bag"](INDICES, OFFSETS), expected, rtol=1e-5, atol=1e-5)


def test_tables_keep_eight_bits_by_default_and_max_norm_stays_in_float() -> None:
    model = nn.ModuleDict({"bag": nn.EmbeddingBag(50, 64), "normed": nn.EmbeddingBag(50, 64, max_norm=1.0)})
    rows = {row.name: row for row in hb.plan(model, hb.int4_weight_only(32)).rows}
    assert rows["bag.table"].scheme == hb.int8_weight_only()
    assert rows["normed"].scheme is None and "max_norm" in rows["normed"].reason


def test_save_load_copy_compile_and_export(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"bag": nn.EmbeddingBag(50, 64, mode="sum")})

    model = build()
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    expected = model["bag"](INDICES, OFFSETS)
    hb.save(model, tmp_path / "m.safetensors")
    loaded = hb.load_(build(), tmp_path / "m.safetensors")
    assert torch.equal(loaded["bag"](INDICES, OFFSETS), expected)
    assert torch.equal(copy.deepcopy(model)["bag"](INDICES, OFFSETS), expected)
    assert torch.equal(torch.compile(model["bag"], backend="aot_eager", fullgraph=True)(INDICES, OFFSETS), expected)
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(model["bag"], (INDICES, OFFSETS), dynamic_shapes=({0: length}, None))
    assert torch.equal(program.module()(INDICES[:9], OFFSETS), model["bag"](INDICES[:9], OFFSETS))


def test_opcheck() -> None:
    table = torch.randint(0, 256, (10, 8), dtype=torch.uint8)
    arguments = (INDICES % 10, OFFSETS, None, table, torch.rand(10, 1), None, 4, 10, 16, 16, False, 0, False, None)
    torch.library.opcheck(torch.ops.halfbyte.embedding_bag_weight_only.default, (*arguments, torch.float32))


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "message"),
    [
        (torch.tensor([1, 50]), torch.tensor([0]), IndexError, "index 50 is outside a table of num_embeddings=50"),
        (torch.tensor([-1, 5]), torch.tensor([0]), IndexError, "index -1 is outside"),
        (INDICES, torch.tensor([0, 5, 3]), ValueError, r"offsets\[2\]=3 is not in 5..11"),
        (INDICES, torch.tensor([0, 12]), ValueError, r"offsets\[1\]=12 is not in 0..11"),
        (INDICES, torch.tensor([1, 2]), ValueError, r"offsets\[0\] is not 0"),
        (INDICES, None, ValueError, "no offsets"),
        (INDICES.reshape(1, 11), torch.tensor([0]), ValueError, "each row of a matrix is a bag"),
        (INDICES.float(), torch.tensor([0]), TypeError, "indices have dtype|indices has dtype"),
        (INDICES.reshape(1, 1, 11), None, ValueError, "3 dimensions"),
    ],
)
def test_bad_input_is_refused(indices: Tensor, offsets: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantized_bag(hb.int8_weight_only(), mode="sum")(indices, offsets)


@pytest.mark.parametrize(
    ("indices", "offsets", "error", "message"),
    [
        (torch.tensor([1, 50]), torch.tensor([0]), IndexError, "index 50 is outside a table of num_embeddings=50"),
        (torch.tensor([-1, 5]), torch.tensor([0]), IndexError, "index -1 is outside"),
        (INDICES, torch.tensor([0, 5, 3]), ValueError, r"offsets\[1\]=5 is followed by 3"),
        (INDICES, torch.tensor([0, 12]), ValueError, r"offsets\[1\]=12 is followed by 11"),
        (INDICES, torch.tensor([1, 2]), ValueError, r"offsets\[0\] is not 0"),
        (INDICES, torch.tensor([0.0, 2.0]), TypeError, "offsets has dtype torch.float32"),
    ],
)
def test_bad_input_of_sixteen_bit_tables_is_refused(
    indices: Tensor, offsets: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantized_bag(hb.bf16(), mode="sum")(indices, offsets)


def test_last_offset_is_the_number_of_indices() -> None:
    bag = quantized_bag(hb.int8_weight_only(), include_last_offset=True)
    with pytest.raises(ValueError, match=r"offsets end with 10; .* the number of indices, 11"):
        bag(INDICES, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="offsets are empty"):
        bag(INDICES, torch.zeros(0, dtype=torch.int64))


def test_weights_need_mode_sum_and_the_shape_of_the_indices() -> None:
    with pytest.raises(ValueError, match="need mode='sum'"):
        quantized_bag(hb.int8_weight_only(), mode="mean")(INDICES, OFFSETS, torch.ones(11))
    with pytest.raises(ValueError, match="one weight for each index"):
        quantized_bag(hb.int8_weight_only(), mode="sum")(INDICES, OFFSETS, torch.ones(10))
