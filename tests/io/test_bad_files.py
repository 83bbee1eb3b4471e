"""Files that are wrong, damaged, newer or of another model: always FileFormatError, and the skeleton as it was."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_models import SCHEMES, Net, meta_net, quantized_net, save_to
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.io.container import Reader


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.head = nn.Linear(16, 8)
        self.head.weight = self.table.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.table(x)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    model = Tiny()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    return save_to(tmp_path_factory.mktemp("tiny"), model).read_bytes()


def load_tiny(data: bytes, folder: Path) -> nn.Module:
    path = folder / "tiny.safetensors"
    path.write_bytes(data)
    return hb.load_(Tiny(), path)


def assert_rejected_or_identical(data: bytes, folder: Path, whole: bytes) -> None:
    try:
        loaded = load_tiny(data, folder)
    except hb.FileFormatError as error:
        assert str(folder / "tiny.safetensors") in str(error)
        return
    assert save_to(folder, loaded, "again").read_bytes() == whole


def test_file_cut_at_any_byte_is_rejected(tiny: bytes, tmp_path: Path) -> None:
    header = 8 + int.from_bytes(tiny[:8], "little")
    cuts = {*range(64), *range(64, header, 97), *range(header - 40, header + 40), *range(header, len(tiny), 31)}
    for cut in sorted({*cuts, len(tiny) - 1}):
        with pytest.raises(hb.FileFormatError):
            load_tiny(tiny[:cut], tmp_path)


def test_any_altered_byte_is_rejected_or_means_the_same(tiny: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    for position in range(0, len(tiny), 3):
        altered = bytearray(tiny)
        altered[position] ^= 1 << rng.randrange(8)
        assert_rejected_or_identical(bytes(altered), tmp_path, tiny)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_crash(data: st.DataObject, tiny: bytes, tmp_path: Path) -> None:
    damaged = bytearray(tiny)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(begin, min(begin + 24, len(damaged))))
        damaged[begin:end] = data.draw(st.binary(max_size=24))
    assert_rejected_or_identical(bytes(damaged), tmp_path, tiny)


def test_every_altered_tensor_is_named(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int4_group"]))
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        begin, end = fields["data_offsets"]
        altered = bytearray(whole)
        altered[8 + size + (begin + end) // 2] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(hb.FileFormatError, match=f"'{name}' was altered"):
            hb.load_(meta_net(), path)


@pytest.mark.parametrize("data", [b"", b"abc", b"PK\x03\x04" + b"\0" * 500, b"not a model" * 100])
def test_other_files_are_rejected(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(hb.FileFormatError, match="not a safetensors file"):
        load_tiny(data, tmp_path)


def test_safetensors_of_another_program_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_model(nn.Sequential(nn.Linear(4, 4)), path)
    with pytest.raises(hb.FileFormatError, match="halfbyte did not write"):
        hb.load_(nn.Sequential(nn.Linear(4, 4)), path)


def test_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hb.load_(Tiny(), tmp_path / "none")


def rewrite(data: bytes, change: Callable[[dict], None], *, sign: bool = True) -> bytes:
    """The file with another description, its digest made to fit."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    content = json.loads(header["__metadata__"]["halfbyte"])
    change(content)
    if sign:
        content.pop("sha256", None)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    header["__metadata__"]["halfbyte"] = json.dumps(content, sort_keys=True, separators=(",", ":"))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_rewriting_without_a_change_still_loads(tiny: bytes, tmp_path: Path) -> None:
    loaded = load_tiny(rewrite(tiny, lambda content: None), tmp_path)
    assert any(isinstance(module, hb.nn.QuantizedModule) for module in loaded.modules())


def test_newer_format_is_named_with_the_fix(tiny: bytes, tmp_path: Path) -> None:
    newer = rewrite(tiny, lambda content: content.update(format_version=2, halfbyte_version="9.9"), sign=False)
    with pytest.raises(hb.FileFormatError, match=r"format_version 2, written by halfbyte 9\.9.*upgrade"):
        load_tiny(newer, tmp_path)


def test_description_altered_without_its_digest_is_rejected(tiny: bytes, tmp_path: Path) -> None:
    altered = rewrite(tiny, lambda content: content["modules"]["head"].update(bias=False), sign=False)
    with pytest.raises(hb.FileFormatError, match="description was altered"):
        load_tiny(altered, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["modules"]["head"].update(type="QuantizedConv"),
        lambda c: c["modules"]["head"].update(type="HalfLinear"),
        lambda c: c["modules"]["head"].update(type="QuantizedEmbedding"),
        lambda c: c["modules"]["head"].update(layout="rows"),
        lambda c: c["modules"]["head"].update(layout=None),
        lambda c: c["modules"]["head"].update(shape=[8]),
        lambda c: c["modules"]["head"].update(shape=[-8, 16]),
        lambda c: c["modules"]["head"].update(shape=[1 << 60, 16]),
        lambda c: c["modules"]["head"].update(dtype="int8"),
        lambda c: c["modules"]["head"].update(extra=1),
        lambda c: c["modules"]["head"].pop("scheme"),
        lambda c: c["modules"]["head"]["scheme"]["weight"].update(bits=9),
        lambda c: c["modules"]["head"]["scheme"]["weight"].update(bits=4, narrow_range=False),
        lambda c: c["modules"]["head"]["scheme"]["weight"].update(granularity={"per": "group", "group_size": 5}),
        lambda c: c["modules"]["head"]["scheme"]["weight"].update(granularity={"per": "group", "group_size": 0}),
        lambda c: c["modules"]["head"]["scheme"]["weight"].update(scale_dtype="float16"),
        lambda c: c["modules"].update(head=[]),
        lambda c: c["modules"].update(head={"same_as": "nobody"}),
        lambda c: c["modules"].pop("head"),
        lambda c: c.update(modules=[]),
        lambda c: c.update(aliases={"table.scale": "nothing"}),
        lambda c: c.update(aliases={}),
        lambda c: c.update(non_persistent=["nothing"]),
        lambda c: c.update(non_persistent=[[]]),
        lambda c: c.update(surprise=1),
        lambda c: c.update(format_version="1"),
        lambda c: c.update(format_version=True),
        lambda c: c.update(format_version=0),
        lambda c: c.pop("tensors"),
        lambda c: c["tensors"].pop("norm.bias"),
        lambda c: c["tensors"]["norm.bias"].update(dtype="int32"),
        lambda c: c["tensors"]["norm.bias"].update(shape=[2, 4]),
        lambda c: c["tensors"]["norm.bias"].update(sha256="0"),
        lambda c: c["tensors"].update({"norm.bias": None}),
    ],
)
def test_descriptions_that_make_no_sense_are_rejected(
    change: Callable[[dict], None], tiny: bytes, tmp_path: Path
) -> None:
    with pytest.raises(hb.FileFormatError):
        load_tiny(rewrite(tiny, change), tmp_path)


def state_of(model: nn.Module) -> tuple[list[tuple[str, type]], list[int]]:
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    return [(name, type(module)) for name, module in model.named_modules()], tensors


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def without(name: str) -> nn.Module:
    model = Net()
    delattr(model, name)
    return model


def replaced(name: str, module: nn.Module) -> nn.Module:
    model = Net()
    setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("skeleton", "message"),
    [
        (lambda: Net(width=48), r"'first' has weight shape \(48, 48\) in the model and \(32, 32\) in the file"),
        (lambda: without("second"), "no module 'second'"),
        (lambda: Untied(), r"no values for 'extra.bias', 'extra.weight'"),
        (lambda: without("norm"), r"it has 'norm.bias', 'norm.num_batches_tracked', 'norm.running_mean' and 2 more"),
        (lambda: without("frozen"), r"it has 'frozen'"),
        (lambda: replaced("second", nn.Linear(32, 32)), "'second' has a bias in the model and none in the file"),
        (lambda: replaced("first", nn.Linear(32, 32, bias=False)), "'first' has no bias in the model and one"),
        (lambda: replaced("second", nn.Conv1d(32, 32, 1)), "'second' is a Conv1d in the model"),
        (lambda: replaced("second", nn.Embedding(32, 32)), "'second' is a Embedding in the model"),
        (lambda: replaced("second", nn.LazyLinear(32, bias=False)), "'second'.* known shape"),
        (
            lambda: replaced("frozen", nn.Parameter(torch.ones(7))),
            r"'frozen' has shape \(7,\) in the model and \(32,\)",
        ),
        (lambda: replaced("steps", torch.tensor(1.0)), "'steps' is torch.float32 in the model and torch.int64"),
    ],
)
def test_another_model_is_rejected_and_left_as_it_was(
    skeleton: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    model = skeleton()
    before = state_of(model)
    with pytest.raises(hb.FileFormatError, match=message):
        hb.load_(model, path)
    assert state_of(model) == before


def test_damage_found_in_the_last_tensor_leaves_the_skeleton_as_it_was(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = Net()
    before, weights = state_of(model), {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(hb.FileFormatError, match="altered"):
        hb.load_(model, path)
    assert state_of(model) == before
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())


def test_quantized_skeleton_is_refused(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    with pytest.raises(hb.QuantizationError, match="quantized already"):
        hb.load_(model, save_to(tmp_path, model))


def test_non_persistent_buffer_missing_from_file_and_skeleton_on_meta_is_rejected(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    skeleton = meta_net()
    skeleton.register_buffer("mask", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(hb.FileFormatError, match="no values for 'mask'"):
        hb.load_(skeleton, path)


def test_file_replaced_by_a_shorter_one_is_rejected_not_a_bus_error(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    with Reader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 64)
        with pytest.raises(hb.FileFormatError, match="ends inside tensor"):
            for name in reader.tensors:
                reader.read(name)
