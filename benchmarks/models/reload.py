"""Reloads saved models on meta-device skeletons in this process and compares their outputs bit for bit.

Run as ``python -m benchmarks.models.reload KIND (FILE EXPECTED)...`` by the benchmarks and the tests, in a process that
has never seen the float weights. `EXPECTED` is a safetensors file with the inputs and the output to reproduce.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import halfbyte as hb

from . import llama, minilm, shared_data

__all__ = ["output_of", "same_in_new_process", "save_expected"]


@torch.inference_mode()
def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a language model, or last hidden state of an encoder."""
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def save_expected(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Writes `inputs` and the model's output for them, to be reproduced by `same_in_new_process`."""
    save_file({**inputs, "output": output_of(model, inputs).contiguous()}, path)


def same_in_new_process(kind: str, files: list[tuple[Path, Path]]) -> list[bool]:
    """For each (model file, expected file): does a fresh process give the same bits from a meta skeleton?"""
    repository = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        f"{__package__}.reload",
        kind,
        *(str(path.resolve()) for pair in files for path in pair),
    ]
    paths = [str(repository), str(repository / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for entry in paths for p in entry.split(os.pathsep)),
    }
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        raise RuntimeError(f"reloading failed:\n{answer.stderr}")
    return [line == "same" for line in answer.stdout.split()]


def _main(kind: str, *paths: str) -> None:
    root = shared_data()
    assert root is not None, "no shared data on this machine"
    for file, expected_file in zip(paths[::2], paths[1::2], strict=True):
        model = minilm.skeleton(root) if kind == "minilm" else llama.skeleton(root, kind)
        hb.load_(model, file)
        inputs = load_file(expected_file)
        expected = inputs.pop("output")
        print("same" if torch.equal(output_of(model, inputs), expected) else "different")


if __name__ == "__main__":
    _main(*sys.argv[1:])
