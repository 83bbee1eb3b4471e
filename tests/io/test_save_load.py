"""hb.save and hb.load_: the same bits come back, from equal bytes, with ties kept and nothing else touched."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from saved_models import SCHEMES, Net, indices, meta_net, quantized_net, save_to
from torch import nn

import halfbyte as hb
from halfbyte.io import container


@pytest.mark.parametrize("name", SCHEMES)
def test_loaded_model_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = quantized_net(SCHEMES[name])
    loaded = hb.load_(meta_net(), save_to(tmp_path, model))
    assert torch.equal(loaded(indices()), model(indices()))
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
        assert loaded.state_dict()[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", SCHEMES)
def test_saving_twice_and_saving_after_loading_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    model = quantized_net(SCHEMES[name])
    first = save_to(tmp_path, model, "first").read_bytes()
    assert save_to(tmp_path, model, "second").read_bytes() == first
    assert save_to(tmp_path, hb.load_(Net(), tmp_path / "first"), "third").read_bytes() == first
    assert save_to(tmp_path, hb.load_(meta_net(), tmp_path / "first"), "fourth").read_bytes() == first


def test_file_of_another_process_has_the_same_bytes(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int4_group"]))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import saved_models as s;"
        "s.save_to(Path(sys.argv[2]), s.quantized_net(s.SCHEMES['int4_group']), 'other')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True, env=environment)
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_shared_tensors_are_stored_once_and_come_back_shared(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int4_group"]))
    stored = safetensors.torch.load_file(path)
    assert ("head.qweight" in stored) != ("table.qweight" in stored)
    assert not any(key.startswith("first.") for key in stored)  # "again" sorts before it
    loaded = hb.load_(meta_net(), path)
    assert loaded.head.qweight is loaded.table.qweight
    assert loaded.head.scale is loaded.table.scale
    assert loaded.first is loaded.again


def test_tied_float_parameters_come_back_as_one_parameter(tmp_path: Path) -> None:
    recipe = hb.Recipe(default=hb.int8_weight_only(), overrides={nn.Embedding: None, "head": None})
    loaded = hb.load_(meta_net(), save_to(tmp_path, quantized_net(recipe)))
    assert isinstance(loaded.head, nn.Linear)
    assert loaded.head.weight is loaded.table.weight
    assert isinstance(loaded.head.weight, nn.Parameter)


def test_tied_sixteen_bit_weights_come_back_as_one_parameter(tmp_path: Path) -> None:
    loaded = hb.load_(meta_net(), save_to(tmp_path, quantized_net(hb.bf16())))
    assert loaded.head.weight is loaded.table.weight
    assert loaded.head.weight.dtype == torch.bfloat16


def test_file_has_no_float_weight_of_a_quantized_module(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int4_group"]))
    stored = safetensors.torch.load_file(path)
    for name in ("table", "head", "again", "first", "second"):
        assert f"{name}.weight" not in stored
    assert {t.dtype for key, t in stored.items() if key.endswith("qweight")} == {torch.uint8}


def test_bytes_after_of_the_report_is_the_size_of_the_data(tmp_path: Path) -> None:
    model = Net()
    report = hb.quantize_(model, hb.int4_weight_only(16), progress=False)
    path = save_to(tmp_path, model)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == report.bytes_after


def test_safetensors_library_reads_the_tensors(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    stored = safetensors.torch.load_file(save_to(tmp_path, model))
    assert torch.equal(stored["second.qweight"], model.second.qweight)
    assert torch.equal(stored["norm.running_var"], model.norm.running_var)
    assert torch.equal(stored["angles"], model.angles)  # outside the state dict, and needed on a meta skeleton


def test_loading_leaves_nothing_on_the_meta_device(tmp_path: Path) -> None:
    loaded = hb.load_(meta_net(), save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"])))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_skeleton_may_have_any_float_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    loaded = hb.load_(Net().eval().to(dtype), save_to(tmp_path, model))
    assert torch.equal(loaded(indices()), model(indices()))


def test_model_in_half_precision_comes_back_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)).to(torch.bfloat16)
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    loaded = hb.load_(nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)), save_to(tmp_path, model))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].weight.dtype == torch.bfloat16
    assert loaded[0].bias.dtype == torch.bfloat16


def test_training_flag_and_requires_grad_are_the_skeletons(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    skeleton = meta_net().train()
    skeleton.second.eval()
    loaded = hb.load_(skeleton, path)
    assert loaded is skeleton
    assert loaded.training and loaded.first.training and not loaded.second.training
    assert loaded.lstm.ih_l0.bias.requires_grad and not loaded.frozen.requires_grad
    assert loaded.first.bias.requires_grad


def test_hooks_of_the_skeleton_stay(tmp_path: Path) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    skeleton, seen = meta_net(), []
    skeleton.second.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    hb.load_(skeleton, path)(indices())
    assert seen == ["QuantizedLinear"]


def test_loaded_tensors_are_aligned_copies_of_their_own(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int4_group"])
    path = save_to(tmp_path, model)
    loaded = hb.load_(meta_net(), path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    path.unlink()
    assert torch.equal(loaded(indices()), model(indices()))
    assert all(t.data_ptr() % 64 == 0 for t in (*loaded.parameters(), *loaded.buffers()))


def test_derived_buffers_that_only_one_side_has_do_not_matter(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    model.register_buffer("gone_by_now", torch.ones(3), persistent=False)
    path = save_to(tmp_path, model)
    skeleton = Net()
    skeleton.register_buffer("new_by_now", torch.full((2,), 7.0), persistent=False)
    loaded = hb.load_(skeleton, path)
    assert torch.equal(loaded.new_by_now, torch.full((2,), 7.0))
    assert not hasattr(loaded, "gone_by_now")


def test_empty_and_scalar_tensors_survive(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    model.register_buffer("nothing", torch.empty(0, 3))
    model.register_buffer("flag", torch.tensor(True))
    path = save_to(tmp_path, model)
    skeleton = meta_net()
    skeleton.register_buffer("nothing", torch.empty(0, 3))
    skeleton.register_buffer("flag", torch.tensor(False))
    loaded = hb.load_(skeleton, path)
    assert loaded.nothing.shape == (0, 3)
    assert loaded.flag.item() is True
    assert loaded.steps.item() == 3


def test_transformer_layers_stay_off_the_fused_path_after_loading(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    torch.manual_seed(0)
    model = build()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    loaded = hb.load_(build(), save_to(tmp_path, model))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]))
    before = path.read_bytes()

    def half_written(specs: object, filename: str, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(container, "serialize_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        hb.save(quantized_net(SCHEMES["int4_group"]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_the_old_file_or_of_a_new_one(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    mask = os.umask(0o027)
    try:
        path = save_to(tmp_path, model)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    hb.save(model, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_missing_folder_raises_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        hb.save(quantized_net(SCHEMES["int8_dynamic"]), tmp_path / "nowhere" / "model.safetensors")


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    real = save_to(tmp_path, quantized_net(SCHEMES["int8_dynamic"]), "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    model = quantized_net(SCHEMES["int4_group"])
    hb.save(model, link)
    assert link.is_symlink()
    assert torch.equal(hb.load_(meta_net(), real)(indices()), model(indices()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "not quantized.*safetensors.torch.save_model"),
        (hb.prepare_(nn.Sequential(nn.Linear(16, 4)), hb.int8_dynamic()), "convert_"),
    ],
)
def test_models_that_are_not_quantized_are_refused(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(hb.QuantizationError, match=message):
        hb.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_tensors_without_data_are_refused_by_name(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    model.norm.to("meta")
    with pytest.raises(hb.QuantizationError, match=r"norm\..* meta device"):
        hb.save(model, tmp_path / "model")


def test_loading_holds_the_data_once(tmp_path: Path) -> None:
    """Peak memory of a fresh process that loads on a meta skeleton: the data once, not twice."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(12)))
    for layer in model:
        layer.weight.data.fill_(0.5)
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    path = save_to(tmp_path, model)
    code = """
import resource, sys, torch, halfbyte as hb
from torch import nn
def build():
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(12)))
small = nn.Sequential(nn.Linear(16, 16)); hb.quantize_(small, hb.int8_weight_only(), progress=False)
hb.save(small, sys.argv[1] + ".small"); hb.load_(nn.Sequential(nn.Linear(16, 16)), sys.argv[1] + ".small")
skeleton = build()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hb.load_(skeleton, sys.argv[1])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, env=environment, capture_output=True, text=True
    )
    assert int(answer.stdout) < 1.2 * path.stat().st_size
