"""Interrupted quantizations go on where they were, to the same bytes; failed ones say what was wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from block_models import data, make
from test_streaming import RECIPE, skeleton, write_shards
from torch import Tensor

import halfbyte as hb
from halfbyte.staging import TensorStore


class Interrupted(hb.GPTQ):
    """Ctrl-C in the middle of a block."""

    def round_layer(self, name, *arguments):  # type: ignore[no-untyped-def]
        if name == "layers.2.up":
            raise KeyboardInterrupt
        return super().round_layer(name, *arguments)


Interrupted.__qualname__ = "GPTQ"  # its repr is that of the algorithm which goes on


class Counted(hb.GPTQ):
    """Says which layers it rounded."""

    rounded: ClassVar[list[str]] = []

    def round_layer(self, name, *arguments):  # type: ignore[no-untyped-def]
        self.rounded.append(name)
        return super().round_layer(name, *arguments)


Counted.__qualname__ = "GPTQ"


def saved(path: Path, algorithm: object, **options: object) -> bytes:
    """Bytes of a model quantized in memory."""
    model = make()
    hb.quantize_(model, RECIPE, data=data(1), algorithms=[algorithm], progress=False, **options)  # type: ignore[list-item, arg-type]
    hb.save(model, path)
    return path.read_bytes()


def test_an_interrupted_model_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    wanted, state = saved(tmp_path / "wanted", hb.GPTQ()), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "out", Interrupted(), state_folder=state)
    Counted.rounded.clear()
    assert saved(tmp_path / "out", Counted(), state_folder=state) == wanted
    assert all(name.startswith(("layers.2", "head")) for name in Counted.rounded)


def test_a_state_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    saved(tmp_path / "out", hb.GPTQ(), state_folder=state)
    with pytest.raises(hb.QuantizationError, match="belongs to another run: its algorithms differ"):
        saved(tmp_path / "out", hb.GPTQ(polish=1), state_folder=state)
    with pytest.raises(hb.QuantizationError, match="its data differ"):
        hb.quantize_(make(), RECIPE, data=data(2), algorithms=[hb.GPTQ()], progress=False, state_folder=state)
    with pytest.raises(hb.QuantizationError, match="weights differ"):
        hb.quantize_(make(1), RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False, state_folder=state)
    with pytest.raises(hb.QuantizationError, match="is no state folder"):
        saved(tmp_path / "out", hb.GPTQ(), state_folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(hb.QuantizationError, match="is a file, and no state folder"):
        saved(tmp_path / "out", hb.GPTQ(), state_folder=tmp_path / "file")
    with pytest.raises(hb.QuantizationError, match="block by block"):
        hb.quantize_(make(), RECIPE, progress=False, state_folder=state)


# Kills itself while it writes the results of the third block.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import halfbyte as hb
from halfbyte.io import container
from block_models import data
from test_streaming import RECIPE, skeleton

serialize = container.serialize_file
def killed(specs, path, metadata):
    if "step-00002" in str(path):
        Path(path).write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    serialize(specs, path, metadata=metadata)
container.serialize_file = killed
folder = Path(sys.argv[2])
hb.quantize_checkpoint(skeleton(), folder, folder / "out", RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False)
"""


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    wanted = saved(tmp_path / "wanted", hb.GPTQ())
    (tmp_path / "wanted").unlink()
    source = write_shards(make(), tmp_path)
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    Counted.rounded.clear()
    hb.quantize_checkpoint(
        skeleton(), source, tmp_path / "out", RECIPE, data=data(1), algorithms=[Counted()], progress=False
    )
    assert (tmp_path / "out").read_bytes() == wanted
    assert Counted.rounded and all(name.startswith(("layers.2", "head")) for name in Counted.rounded)
    assert not (tmp_path / "out.state").exists()


def test_disk_full_leaves_the_model_and_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.io import container

    wanted, state = saved(tmp_path / "wanted", hb.GPTQ()), tmp_path / "state"
    serialize = container.serialize_file

    def full(specs: object, path: Path, metadata: object) -> None:
        if "step-00001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        serialize(specs, path, metadata=metadata)  # type: ignore[arg-type]

    monkeypatch.setattr(container, "serialize_file", full)
    model = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(OSError, match="No space left"):
        hb.quantize_(model, RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False, state_folder=state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    monkeypatch.undo()
    assert saved(tmp_path / "out", hb.GPTQ(), state_folder=state) == wanted


def test_a_full_temporary_folder_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorStore(0) as store:
        store.put("first", torch.zeros(4))
        monkeypatch.setattr(store, "_file", open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
        with pytest.raises(OSError, match=r"No space left on device.*TMPDIR"):
            store.put("second", torch.zeros(4))


def test_values_that_spill_come_back_and_are_replaced() -> None:
    with TensorStore(100) as store:
        tensors: dict[str, Tensor] = {
            "a": torch.randn(5, 3), "b": torch.tensor(0.5), "c": torch.randn(4, 4).t(), "d": torch.tensor([True, False]),
            "e": torch.zeros(0, 3),
        }  # fmt: skip
        for round_ in range(2):
            for key, tensor in tensors.items():
                store.put(key, tensor + round_ if tensor.dtype != torch.bool else tensor)
            for key, tensor in tensors.items():
                found = store.get(key)
                assert torch.equal(found, tensor + round_ if tensor.dtype != torch.bool else tensor)
                assert found.shape == tensor.shape
        assert store.spilled_bytes == 64  # "c", written over


def test_hidden_states_that_spill_change_nothing(tmp_path: Path) -> None:
    wanted = saved(tmp_path / "wanted", hb.GPTQ())
    assert saved(tmp_path / "out", hb.GPTQ(), max_memory=700_000) == wanted


def test_memory_that_running_takes_is_refused_before_any_layer_is_rounded() -> None:
    Counted.rounded.clear()
    model = make()
    with pytest.raises(hb.QuantizationError, match=r"running a block on the first batch takes .* smaller batches"):
        hb.quantize_(model, RECIPE, data=data(1), algorithms=[Counted()], progress=False, max_memory=360_000)
    assert not Counted.rounded
