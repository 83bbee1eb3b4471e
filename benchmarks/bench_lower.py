"""`hb.lower` of MobileNetV2 and ResNet-50 (random weights) beside ONNX Runtime and OpenVINO in INT8, and torch.

    python benchmarks/bench_lower.py --prepare peers   # their files: quantized by ONNX Runtime, and by NNCF where it is
    python benchmarks/bench_lower.py --peers peers --json benchmarks/results/lower.json

Needs `onnx`, `onnxruntime` and `openvino` for their rows; `nncf` writes OpenVINO's model. All rows take turns in one
process, with the same images, contiguous as users have them; torch's and ours also channels last.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import halfbyte as hb

# Past models/__init__.py, which needs transformers: the Python with the peers may not have it.
sys.path.insert(0, str(Path(__file__).resolve().parent / "models"))
import backbones

Row = Callable[[], object]
QDQ = {"u8s8": "QUInt8", "s8s8": "QInt8"}


def images(count: int) -> Tensor:
    """Random ones: time does not depend on what they show."""
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def prepare(folder: Path, name: str) -> None:
    """The peers' files of a network."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter([{"x": images(8)[i : i + 1].numpy()} for i in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    folder.mkdir(parents=True, exist_ok=True)
    model = backbones.backbone(backbones.BACKBONES[name], images(8))
    plain, ready = folder / f"{name}.onnx", folder / f"{name}.pre.onnx"
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    torch.onnx.export(
        model, (images(1),), str(plain), input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
    )
    quant_pre_process(str(plain), str(ready))
    for suffix, kind in QDQ.items():
        quantize_static(
            str(ready),
            str(folder / f"{name}.{suffix}.onnx"),
            Reader(),
            QuantFormat.QDQ,
            per_channel=True,
            activation_type=getattr(QuantType, kind),
            weight_type=QuantType.QInt8,
        )
    try:
        import nncf
        import openvino
    except ImportError:
        print(f"{name}: no nncf here; OpenVINO runs ONNX Runtime's file")
        return
    data = nncf.Dataset([images(8)[i : i + 1].numpy() for i in range(4)])
    quantized = nncf.quantize(
        openvino.Core().read_model(str(plain)), data, preset=nncf.QuantizationPreset.MIXED, subset_size=4
    )
    openvino.save_model(quantized, str(folder / f"{name}.xml"), compress_to_fp16=False)


def torch_rows(name: str, batch: int, cache: Path | None) -> dict[str, Row]:
    """Ours and torch's float."""
    file = None if cache is None else cache / f"{name}.pt"
    if file is not None and file.exists():
        model, quantized, lowered = torch.load(file, weights_only=False)
    else:
        model = backbones.backbone(backbones.BACKBONES[name], images(8))
        hb.fuse_(model, images(2))
        quantized = copy.deepcopy(model)
        hb.quantize_(quantized, hb.int8_static(), [images(8)], progress=False)
        lowered = hb.lower(quantized, images(2))
        if file is not None:
            torch.save((model, quantized, lowered), file)
    x = images(batch)
    last = x.contiguous(memory_format=torch.channels_last)
    in_last: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        assert torch.equal(lowered(x), quantized(x))
    return {
        "torch float32, channels last": lambda: in_last(last),
        "halfbyte converted": lambda: quantized(x),
        "halfbyte converted, channels last": lambda: quantized(last),
        "halfbyte lowered": lambda: lowered(x),
    }


def onnxruntime_rows(folder: Path, name: str, batch: int, threads: int) -> dict[str, Row]:
    """Static QDQ models, with inputs bound."""
    import onnxruntime

    rows: dict[str, Row] = {}
    for suffix in QDQ:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = folder / f"{name}.{suffix}.onnx"
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        x = {"x": images(batch).numpy()}
        rows[f"ONNX Runtime INT8 {suffix}"] = lambda s=session, x=x: s.run(None, x)  # type: ignore[misc]
    return rows


def openvino_rows(folder: Path, name: str, batch: int, threads: int) -> dict[str, Row]:
    """NNCF's model, or ONNX Runtime's."""
    import openvino

    files = [folder / f"{name}.xml", folder / f"{name}.u8s8.onnx"]
    file = next(file for file in files if file.exists())
    model = openvino.Core().read_model(str(file))
    model.reshape([batch, 3, 224, 224])
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    x = images(batch).numpy()
    tensor = openvino.Tensor(x, shared_memory=True)
    request.set_input_tensor(tensor)

    def call(keep: object = (x, tensor, model)) -> None:
        request.infer(share_outputs=True)

    return {f"OpenVINO INT8 ({'NNCF' if file.suffix == '.xml' else 'QDQ'})": call}


def measure(rows: dict[str, Row], seconds: float) -> dict[str, float]:
    """Median milliseconds of each row; rows take turns of three calls."""
    taken: dict[str, list[float]] = {name: [] for name in rows}
    with torch.inference_mode():
        for row in rows.values():
            row(), row()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(taken.values()))) < 6:
            for name, row in rows.items():
                time.sleep(0.05)  # threads of the row before it spin for a while
                row()  # and it has emptied the caches
                for _ in range(3):
                    start = time.perf_counter()
                    row()
                    taken[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(backbones.BACKBONES)
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="write the peers' models there, and stop")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where --prepare wrote; without it only torch")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep our models there from run to run")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each model and batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.prepare is not None:
        for name in arguments.models:
            prepare(arguments.prepare, name)
        return
    results: dict[str, object] = {
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "capability": hb.cpu_capability(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "halfbyte": hb.__version__,
        }
    }
    for name in arguments.models:
        for batch in arguments.batches:
            rows = torch_rows(name, batch, arguments.cache)
            if arguments.peers is not None:
                rows |= onnxruntime_rows(arguments.peers, name, batch, arguments.threads)
                rows |= openvino_rows(arguments.peers, name, batch, arguments.threads)
            found = measure(rows, arguments.seconds)
            ours = found["halfbyte lowered"]
            peers = {row: time for row, time in found.items() if not row.startswith("halfbyte")}
            print(f"{name}, batch {batch}: fastest peer / lowered = {min(peers.values()) / ours:.2f}")
            for row, milliseconds in sorted(found.items(), key=lambda item: item[1]):
                print(f"  {row:36} {milliseconds:8.2f} ms")
            sys.stdout.flush()
            results[f"{name}, batch {batch}"] = {row: round(ms, 3) for row, ms in found.items()}
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
