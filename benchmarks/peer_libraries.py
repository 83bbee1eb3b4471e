"""Linear layers of the libraries that a user could pick instead, each at its best settings for a CPU.

A library is a function that gives `Variant`s. A variant's `build(w, copies)` makes distinct packed copies of the weight
`[out_features, in_features]`; the layer's `runs(x)` gives one call per copy, each including all that a user pays (activation
quantization, dispatch, the output's memory where the interface allocates it), and `output()` the result of the first copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = 128
Array = np.ndarray
Runs = list[Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the comparison; `act` is what products are computed on: fp32, bf16 or int8."""

    name: str
    scheme: str
    wbits: float
    build: Callable[[Array, int], Any]
    act: str = "fp32"


class TorchLayer:
    """Copies of a weight and a function of one copy and the input."""

    def __init__(self, copies: list[Any], call: Callable[[Any, Any], Any], dtype: str = "float32") -> None:
        self.copies, self.call, self.dtype = copies, call, dtype

    def runs(self, x: Array) -> Runs:
        import torch

        self.x = torch.from_numpy(x).to(getattr(torch, self.dtype))
        return [lambda c=c: self.call(c, self.x) for c in self.copies]

    def output(self) -> Array:
        return self.call(self.copies[0], self.x).float().numpy()


def round_groups(w: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Symmetric codes `[O, G, group]` and scales `[O, G]`; the negative end is used, as the libraries' own tools do."""
    grouped = w.reshape(w.shape[0], -1, group)
    top = 2 ** (bits - 1)
    scale = np.abs(grouped).max(2) / (top - 0.5 if bits < 8 else top - 1)
    codes = np.clip(np.rint(grouped / scale[..., None]), -top, top - 1).astype(np.int8)
    return codes, scale.astype(np.float32)


def torch_variants(threads: int) -> Iterator[Variant]:
    """PyTorch: floats, the x86 engine's dynamic INT8 by oneDNN and by FBGEMM, ATen's INT4 for bfloat16."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)

    def floats(dtype: str) -> Callable[[Array, int], TorchLayer]:
        def build(w: Array, copies: int) -> TorchLayer:
            weight = torch.from_numpy(w).to(getattr(torch, dtype))
            return TorchLayer([weight.clone() for _ in range(copies)], lambda c, x: F.linear(x, c), dtype)

        return build

    def dynamic(engine: str) -> Callable[[Array, int], TorchLayer]:
        def build(w: Array, copies: int) -> TorchLayer:
            torch.backends.quantized.engine = engine
            weight = torch.from_numpy(w)
            zeros = torch.zeros(len(w), dtype=torch.long)
            codes = torch.quantize_per_channel(weight, weight.abs().amax(1).double() / 127, zeros, 0, torch.qint8)
            pack, op = torch.ops.quantized.linear_prepack, torch.ops.quantized.linear_dynamic
            return TorchLayer([pack(codes, None) for _ in range(copies)], lambda c, x: op(x, c, True))

        return build

    def int4(w: Array, copies: int) -> TorchLayer:
        codes, scale = round_groups(w, 4, GROUP)
        packed = torch._convert_weight_to_int4pack_for_cpu(
            torch.from_numpy(codes.reshape(w.shape).astype(np.int32) + 8), 1
        )
        scales = torch.from_numpy(np.stack([scale.T, np.zeros_like(scale.T)], 2).copy()).bfloat16()  # contiguous
        op = torch._weight_int4pack_mm_for_cpu
        return TorchLayer([packed.clone() for _ in range(copies)], lambda c, x: op(x, c, GROUP, scales), "bfloat16")

    yield Variant("torch fp32", "float32", 32, floats("float32"))
    yield Variant("torch bf16", "bfloat16", 16, floats("bfloat16"), "bf16")
    for engine, title in (("onednn", "oneDNN"), ("fbgemm", "FBGEMM")):
        yield Variant(f"torch int8 {title}", "W8A8, activations in 7 bits", 8, dynamic(engine), "int8")
    yield Variant("torch int4", f"W4A16 g{GROUP}", 4, int4, "bf16")


class OnnxLayer:
    """One session a copy, all on the global thread pool, outputs bound beforehand."""

    def __init__(self, model: bytes, copies: int, out_features: int, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.intra_op_num_threads = threads
        providers = ["CPUExecutionProvider"]
        self.sessions = [onnxruntime.InferenceSession(model, options, providers=providers) for _ in range(copies)]
        self.out_features = out_features

    def runs(self, x: Array) -> Runs:
        import onnxruntime

        y = np.empty((len(x), self.out_features), np.float32)
        self.values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in (x, y)]
        bound = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", self.values[0])
            binding.bind_ortvalue_output("y", self.values[1])
            bound.append(lambda s=session, b=binding: s.run_with_iobinding(b))
        self.first = bound[0]
        return bound

    def output(self) -> Array:
        self.first()
        return self.values[1].numpy()


def onnx_variants(threads: int) -> Iterator[Variant]:
    """ONNX Runtime: MatMul, DynamicQuantizeMatMul with signed and unsigned weights, MatMulNBits on INT8 activations."""
    import onnxruntime
    from onnx import TensorProto, helper

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    onnxruntime.set_default_logger_severity(3)
    types = {np.dtype(t): code for t, code in ((np.float32, 1), (np.uint8, 2), (np.int8, 3))}

    def layer(w: Array, copies: int, op: str, constants: list[Array], **attributes: object) -> OnnxLayer:
        names = [f"c{i}" for i in range(len(constants))]
        tensors = [
            helper.make_tensor(n, types[c.dtype], c.shape, np.ascontiguousarray(c).tobytes(), raw=True)
            for n, c in zip(names, constants, strict=True)
        ]
        domain = "" if op == "MatMul" else "com.microsoft"
        node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["M", size])
            for n, size in (("x", w.shape[1]), ("y", w.shape[0]))
        ]
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return OnnxLayer(model.SerializeToString(), copies, w.shape[0], threads)

    def int8(unsigned: bool) -> Callable[[Array, int], OnnxLayer]:
        def build(w: Array, copies: int) -> OnnxLayer:
            codes, scale = round_groups(w, 8, w.shape[1])
            codes, scale = codes.reshape(w.shape).T, scale.reshape(-1)
            if not unsigned:
                return layer(w, copies, "DynamicQuantizeMatMul", [codes, scale])
            codes = (codes.astype(np.int16) + 128).astype(np.uint8)
            return layer(w, copies, "DynamicQuantizeMatMul", [codes, scale, np.full(len(w), 128, np.uint8)])

        return build

    def blocks(bits: int) -> Callable[[Array, int], OnnxLayer]:
        def build(w: Array, copies: int) -> OnnxLayer:
            codes, scale = round_groups(w, bits, GROUP)
            codes = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
            step = 8 // bits
            packed = sum((codes[..., j::step] << (bits * j) for j in range(step)), np.zeros((1,), np.uint8))
            attributes = {"K": w.shape[1], "N": w.shape[0], "bits": bits, "block_size": GROUP, "accuracy_level": 4}
            return layer(w, copies, "MatMulNBits", [packed, scale], **attributes)

        return build

    yield Variant("ORT fp32", "float32", 32, lambda w, copies: layer(w, copies, "MatMul", [w.T]))
    yield Variant("ORT int8 u8", "W8A8 per tensor", 8, int8(True), "int8")
    yield Variant("ORT int8 s8", "W8A8 per tensor; saturates on AVX2", 8, int8(False), "int8")
    for bits in (8, 4, 2):
        yield Variant(f"ORT {bits} bits g{GROUP}", f"W{bits}A8 per block", bits, blocks(bits), "int8")


class OpenVinoLayer:
    """One compiled model a copy."""

    def __init__(self, models: list[Any], settings: dict[str, object]) -> None:
        import openvino

        core = openvino.Core()
        self.models = models  # constants may share memory with them until the first run
        self.requests = [core.compile_model(m, "CPU", settings).create_infer_request() for m in models]

    def runs(self, x: Array) -> Runs:
        import openvino

        self.x = x
        for request in self.requests:
            request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        return [lambda r=r: r.infer(share_outputs=True) for r in self.requests]

    def output(self) -> Array:
        self.requests[0].infer()
        return self.requests[0].get_output_tensor(0).data.copy()


def openvino_variants(threads: int) -> Iterator[Variant]:
    """OpenVINO: float32, compressed INT8 and INT4 weights with and without its dynamic quantization, static INT8."""
    import openvino
    from openvino import opset13 as op

    common = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def layer(
        w: Array, copies: int, weight: Callable[[], Any], static: bool = False, **settings: object
    ) -> OpenVinoLayer:
        def model() -> Any:
            x = op.parameter([-1, w.shape[1]], np.float32, name="x")
            low, high = np.float32(-4.6), np.float32(4.6 * 127 / 128)
            quantized = op.fake_quantize(x, low, high, low, high, 256) if static else x
            return openvino.Model([op.matmul(quantized, weight(), False, True)], [x], "linear")

        return OpenVinoLayer([model() for _ in range(copies)], {**common, **settings})

    def int8(**settings: object) -> Callable[[Array, int], OpenVinoLayer]:
        def build(w: Array, copies: int) -> OpenVinoLayer:
            codes, scale = round_groups(w, 8, w.shape[1])
            codes = codes.reshape(w.shape)
            return layer(
                w, copies, lambda: op.multiply(op.convert(op.constant(codes), "f32"), op.constant(scale)), **settings
            )

        return build

    def int4(**settings: object) -> Callable[[Array, int], OpenVinoLayer]:
        def build(w: Array, copies: int) -> OpenVinoLayer:
            codes, scale = round_groups(w, 4, GROUP)
            nibbles = codes.reshape(w.shape).view(np.uint8) & 15
            packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
            alive: list[Any] = []

            def weight() -> Any:
                data = packed.copy()
                tensor = openvino.Tensor(data, openvino.Shape(codes.shape), openvino.Type.i4)
                alive.append((data, tensor))
                scaled = op.multiply(op.convert(op.constant(tensor), "f32"), op.constant(scale[:, :, None]))
                return op.reshape(scaled, op.constant(np.array(w.shape)), False)

            result = layer(w, copies, weight, **settings)
            result.alive = alive  # type: ignore[attr-defined]
            return result

        return build

    def static(w: Array, copies: int) -> OpenVinoLayer:
        high = np.abs(w).max(1, keepdims=True)
        return layer(w, copies, lambda: op.fake_quantize(op.constant(w), -high, high, -high, high, 255), static=True)

    off = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    yield Variant("OpenVINO fp32", "float32", 32, lambda w, copies: layer(w, copies, lambda: op.constant(w)))
    yield Variant("OpenVINO int8", "W8A8 dynamic", 8, int8(), "int8")
    yield Variant("OpenVINO int8 static", "W8A8, a fixed activation scale", 8, static, "int8")
    yield Variant("OpenVINO int8 weight-only", "W8A32", 8, int8(**off))
    yield Variant("OpenVINO int4", f"W4A8 g{GROUP} dynamic", 4, int4(), "int8")
    yield Variant("OpenVINO int4 weight-only", f"W4A32 g{GROUP}", 4, int4(**off))


def ggml_variants(threads: int) -> Iterator[Variant]:
    """ggml, inside the llama.cpp bindings: its plain layouts and those that its CPU backend interleaves."""
    from peer_ggml import Ggml

    ggml = Ggml(threads)

    def build(kind: str, interleaved: bool) -> Callable[[Array, int], Any]:
        return lambda w, copies: ggml.linear(kind, w, copies, interleaved)

    yield Variant("ggml fp32", "float32", 32, build("F32", False))
    yield Variant("ggml Q8_0", "W8A8 g32", 8.5, build("Q8_0", False), "int8")
    yield Variant("ggml Q4_0", "W4A8 g32, interleaved", 4.5, build("Q4_0", True), "int8")
    yield Variant("ggml Q4_K", "W4A8 g32", 4.5, build("Q4_K", False), "int8")
    yield Variant("ggml Q4_K repack", "W4A8 g32, interleaved", 4.5, build("Q4_K", True), "int8")
    yield Variant("ggml Q2_K", "W2A8", 2.625, build("Q2_K", False), "int8")


def torchao_variants(threads: int) -> Iterator[Variant]:
    """torchao without compilation; its INT4 for CPUs calls ATen's, or dequantizes."""
    import torch
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        quantize_,
    )

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)

    def build(config: Callable[[], Any]) -> Callable[[Array, int], TorchLayer]:
        def make(w: Array, copies: int) -> TorchLayer:
            linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
            linear.weight.data = torch.from_numpy(w).clone()
            model = torch.nn.Sequential(linear)
            quantize_(model, config())
            return TorchLayer([copy.deepcopy(model[0]) for _ in range(copies)], lambda c, x: c(x))

        return make

    int8 = build(lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    int4 = build(
        lambda: Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    )
    yield Variant("torchao int8", "W8A8 per token", 8, int8, "int8")
    yield Variant("torchao int4", f"W4A8 g{GROUP}", 4, int4, "int8")


def halfbyte_variants(threads: int) -> Iterator[Variant]:
    """This project."""
    import torch

    from peers_adapter import linear_variants

    torch.set_num_threads(threads)
    yield from linear_variants(Variant)


LIBRARIES: dict[str, Callable[[int], Iterator[Variant]]] = {
    "halfbyte": halfbyte_variants,
    "torch": torch_variants,
    "onnxruntime": onnx_variants,
    "openvino": openvino_variants,
    "ggml": ggml_variants,
    "torchao": torchao_variants,
}
