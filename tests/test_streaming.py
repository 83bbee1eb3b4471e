"""`hb.quantize_checkpoint`: the bytes that `quantize_` and `save` give, without the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_models import Model, data, make
from safetensors.torch import save_file
from torch import nn

import halfbyte as hb

RECIPE = hb.Recipe(default=hb.int_weight_only(3, group_size=16), overrides={"layers.1.up": None})


def write_shards(model: nn.Module, folder: Path, shards: int = 3) -> Path:
    """The model as Hugging Face saves it."""
    state = model.state_dict()
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: t.contiguous() for n, t in state.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def skeleton() -> Model:
    with hb.without_weights():
        return make()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithms": [hb.MSE()]},
        {"algorithms": [hb.GPTQ()], "data": data(1)},
        {"algorithms": [hb.GPTQ(error_feedback=0.0)], "data": data(1), "max_memory": "1MB"},
    ],
)
def test_the_file_is_the_one_that_a_model_in_memory_gives(tmp_path: Path, options: dict[str, object]) -> None:
    model = make()
    source = write_shards(model, tmp_path)
    built = skeleton()
    streamed = hb.quantize_checkpoint(built, source, tmp_path / "streamed", RECIPE, progress=False, **options)  # type: ignore[arg-type]
    options.pop("max_memory", None)
    report = hb.quantize_(model, RECIPE, progress=False, **options)  # type: ignore[arg-type]
    hb.save(model, tmp_path / "saved")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()
    assert all(parameter.is_meta for parameter in built.parameters())
    assert not (tmp_path / "streamed.state").exists()
    assert streamed.bytes_after == report.bytes_after
    assert [m.relative_error for m in streamed.modules] == [m.relative_error for m in report.modules]


def test_tied_heads_and_one_file(tmp_path: Path) -> None:
    def tied() -> Model:
        model = make()
        model.head.weight = model.embed.weight  # type: ignore[assignment]
        return model

    model = tied()
    state = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "float.safetensors")
    with hb.without_weights():
        built = tied()
    hb.quantize_checkpoint(
        built,
        tmp_path / "float.safetensors",
        tmp_path / "streamed",
        hb.int4_weight_only(16),
        data=data(1),
        algorithms=[hb.GPTQ()],
        progress=False,
    )
    hb.quantize_(model, hb.int4_weight_only(16), data=data(1), algorithms=[hb.GPTQ()], progress=False)
    hb.save(model, tmp_path / "saved")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()


def test_scales_that_do_not_fit_float16_are_found_at_work(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.layers[1].gate.weight.mul_(1e7)  # type: ignore[union-attr, operator]
    source = write_shards(model, tmp_path)
    with pytest.warns(hb.FallbackWarning, match="do not fit float16"):
        report = hb.quantize_checkpoint(skeleton(), source, tmp_path / "out", RECIPE, progress=False)
    assert [f.kind for f in report.fallbacks] == ["scale_dtype"]
    assert hb.load_(skeleton(), tmp_path / "out").layers[1].gate.scale.dtype == torch.float32  # type: ignore[union-attr]


def test_what_is_refused_up_front(tmp_path: Path) -> None:
    model = make()
    source = write_shards(model, tmp_path)

    def call(match: str, built: nn.Module | None = None, scheme: object = RECIPE, **options: object) -> None:
        with pytest.raises((hb.QuantizationError, OSError), match=match):
            hb.quantize_checkpoint(
                skeleton() if built is None else built,
                options.pop("source", source),  # type: ignore[arg-type]
                tmp_path / str(options.pop("out", "out")),
                scheme,  # type: ignore[arg-type]
                progress=False,
                **options,  # type: ignore[arg-type]
            )
        assert not list(tmp_path.glob("out*"))

    call(
        "SmoothQuant needs the whole float model", scheme=hb.int8_dynamic(), algorithms=[hb.SmoothQuant()], data=data(1)
    )
    call("static activations needs the whole", scheme=hb.int8_static())
    call("GPTQ needs calibration data", algorithms=[hb.GPTQ()])
    call("leave it out", data=data(1))
    call("too little", algorithms=[hb.GPTQ()], data=data(1), max_memory=1000)
    call("no repeated blocks", nn.Sequential(nn.Linear(4, 4)))
    call("has shape", Model(width=16))
    call(r"layers\.3\.norm\.weight .* is not in the checkpoint", Model(blocks=4).to("meta"))
    call("does not exist", out="no/where")
    before = (tmp_path / "model-0.safetensors").read_bytes()
    call("would be overwritten", out="model-0.safetensors")
    assert (tmp_path / "model-0.safetensors").read_bytes() == before
    for index in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "other.safetensors.index.json").write_text(index)
        call("is no index of shards", source=tmp_path / "other.safetensors.index.json")
    (tmp_path / "model-1.safetensors").unlink()
    call("names 'model-1.safetensors', which is not there")


def test_buffers_without_values_say_how_to_build_the_skeleton(tmp_path: Path) -> None:
    class Rotary(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    source = write_shards(Rotary(), tmp_path)
    with torch.device("meta"):
        built = Rotary()
    with pytest.raises(hb.QuantizationError, match=r"frequencies .* hb\.without_weights"):
        hb.quantize_checkpoint(built, source, tmp_path / "out", RECIPE, progress=False)
    with hb.without_weights():
        built = Rotary()
    assert not built.frequencies.is_meta
    hb.quantize_checkpoint(built, source, tmp_path / "out", RECIPE, progress=False)
    assert torch.equal(hb.load_(built, tmp_path / "out").frequencies, torch.arange(4.0))


def test_blocks_that_do_not_feed_one_another_are_refused(tmp_path: Path) -> None:
    source = write_shards(make(chained=False), tmp_path)
    with hb.without_weights():
        built = make(chained=False)
    with pytest.raises(hb.QuantizationError, match="do not simply feed one another"):
        hb.quantize_checkpoint(
            built, source, tmp_path / "out", RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False
        )


def test_bad_weights_are_named(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.layers[1].up.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    source = write_shards(model, tmp_path)
    with pytest.raises(hb.QuantizationError, match=r"layers\.1\.up: weight has NaN"):
        hb.quantize_checkpoint(skeleton(), source, tmp_path / "out", hb.int4_weight_only(16), progress=False)


# In a process of its own, as in test_memory.py. 64 blocks of 2 MB; the limit is 80 MB.
PEAK = """
import gc, json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
import halfbyte as hb

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(512, 512), nn.Linear(512, 512)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def resident(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
for index in range(64):
    save_file({f"0.{index}.{n}": t for n, t in Block().state_dict().items()}, folder / f"{index:02d}.safetensors")
with hb.without_weights():
    skeleton = nn.Sequential(nn.Sequential(*(Block() for _ in range(64))))
gptq = {"algorithms": [hb.GPTQ(polish=0)], "progress": False}
hb.quantize_(nn.Sequential(nn.Linear(64, 64)), hb.int4_weight_only(32), data=[torch.randn(99, 64)], **gptq)
batches = [torch.randn(1024, 512) for _ in range(8)]  # 2 MB of hidden states each, and as much of the float model
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
scheme, target = hb.int4_weight_only(128), folder / "out"
hb.quantize_checkpoint(skeleton, folder, target, scheme, data=batches, max_memory=limit, **gptq)
print(json.dumps({"peak": resident("VmHWM") - before}))
"""


@pytest.mark.slow
def test_a_model_larger_than_the_limit_stays_within_it(tmp_path: Path) -> None:
    model_bytes, limit = 64 * 2 * 512 * 513 * 4, 80 * 10**6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(limit)], capture_output=True, text=True, check=True
    )
    assert model_bytes > 1.6 * limit
    assert json.loads(done.stdout)["peak"] <= limit
