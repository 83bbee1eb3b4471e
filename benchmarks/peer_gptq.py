"""GPTQ of another library on one model, in a Python of its own; `bench_gptq_accuracy.py --peers` starts it.

    python benchmarks/peer_gptq.py LIBRARY --model FOLDER --calibration tokens.safetensors --bits 4 --group 32 --out FILE

Asymmetric weights of every Linear layer but the head. What comes out are the dequantized weights by name; the last line
says how many seconds the library's own call took. Both libraries get their best settings: MSE range search, columns in order
of their inputs, groups left in place.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def llmcompressor(folder: Path, tokens: Tensor, bits: int, group: int) -> tuple[dict[str, Tensor], float]:
    """llm-compressor's `oneshot`, with its sequential pipeline."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=bits, symmetric=False, strategy="group", group_size=group, observer="mse", actorder="static"
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        dampening_frac=0.01,
    )
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            rounded = fake_quantize(layer.weight, layer.weight_scale, layer.weight_zero_point, weights)
            found[name] = rounded.detach().float().contiguous()
    return found, seconds


def gptqmodel(folder: Path, tokens: Tensor, bits: int, group: int) -> tuple[dict[str, Tensor], float]:
    """GPTQModel's `quantize` on the CPU."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # one, its choice for two cores, is an error of its thread pool
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=bits,
        group_size=group,
        sym=False,
        desc_act=False,
        act_group_aware=True,
        mse=2.4,
        format="gptq_v2",  # in the other one zero points are one less
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(folder), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    start = time.perf_counter()
    model.quantize(rows, batch_size=8, backend=BACKEND.TORCH)
    seconds = time.perf_counter() - start
    found = {
        name: layer.dequantize_weight().T.float().contiguous()
        for name, layer in model.model.named_modules()
        if hasattr(layer, "dequantize_weight")
    }
    return found, seconds


LIBRARIES = {"llm-compressor": llmcompressor, "GPTQModel": gptqmodel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="holds `tokens`, [windows, tokens]")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = load_file(arguments.calibration)["tokens"]
    weights, seconds = LIBRARIES[arguments.library](arguments.model, tokens, arguments.bits, arguments.group)
    save_file(weights, arguments.out)
    sys.stdout.write(f"\n{seconds}\n")


if __name__ == "__main__":
    main()
