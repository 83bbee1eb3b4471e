"""Matrix products of ggml by ctypes: the libraries that the llama-cpp-python package installs.

A product is a graph of one `mul_mat` node whose output memory is set beforehand. Weights go to the CPU backend's
`CPU_REPACK` buffer where it has an interleaved layout for the type, as llama.cpp puts them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

Array = np.ndarray
TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12}
POINTER, SIZE, I64, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool)]


BASE = {  # name: result, arguments
    "ggml_init": (POINTER, InitParams),
    "ggml_free": (None, POINTER),
    "ggml_new_tensor_2d": (POINTER, POINTER, INT, I64, I64),
    "ggml_mul_mat": (POINTER, POINTER, POINTER, POINTER),
    "ggml_new_graph_custom": (POINTER, POINTER, SIZE, ctypes.c_bool),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_row_size": (SIZE, INT, I64),
    "ggml_quantize_chunk": (SIZE, INT, POINTER, POINTER, I64, I64, I64, POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_buft_name": (ctypes.c_char_p, POINTER),
    "ggml_backend_cpu_buffer_type": (POINTER,),
    "ggml_backend_tensor_alloc": (INT, POINTER, POINTER, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_buffer_get_base": (POINTER, POINTER),
    "ggml_backend_graph_compute": (INT, POINTER, POINTER),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, ctypes.c_char_p),
    "ggml_backend_reg_dev_get": (POINTER, POINTER, SIZE),
}
CPU = {
    "ggml_backend_cpu_reg": (POINTER,),
    "ggml_backend_cpu_init": (POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, POINTER, INT),
}


class Ggml:
    """The loaded libraries and one CPU backend."""

    def __init__(self, threads: int) -> None:
        package = importlib.util.find_spec("llama_cpp")  # importing it would print
        if package is None or package.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        folder = Path(package.origin).parent / "lib"
        for file, functions in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)

    def __getattr__(self, name: str) -> Callable[..., int]:
        raise AttributeError(name)

    def interleaved_buffer(self) -> int | None:
        """The buffer type that re-lays weights out as they are set."""
        get = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        if not get:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(get)(
            self.backend_reg_dev_get(self.backend_cpu_reg(), 0)
        )
        i = 0
        while kinds and kinds[i]:
            if self.backend_buft_name(kinds[i]) == b"CPU_REPACK":
                return kinds[i]
            i += 1
        return None

    def linear(self, kind: str, w: Array, copies: int, interleaved: bool) -> GgmlLayer:
        """Copies of `w` `[out_features, in_features]` in the type `kind`."""
        return GgmlLayer(self, kind, w, copies, interleaved)


class GgmlLayer:
    """Copies of a weight; `runs` makes one graph for each."""

    def __init__(self, ggml: Ggml, kind: str, w: Array, copies: int, interleaved: bool) -> None:
        self.ggml, (self.out_features, self.in_features) = ggml, w.shape
        code = TYPES[kind]
        data = w
        if kind != "F32":
            data = np.empty(len(w) * ggml.row_size(code, w.shape[1]), np.uint8)
            ggml.quantize_chunk(code, w.ctypes.data, data.ctypes.data, 0, *w.shape, None)
        kind_of_buffer = ggml.interleaved_buffer() if interleaved else ggml.backend_cpu_buffer_type()
        if not kind_of_buffer:
            raise RuntimeError("this build of ggml has no interleaved layouts")
        context = ggml.init(InitParams((copies + 8) * 512, None, True))
        self.weights = [ggml.new_tensor_2d(context, code, w.shape[1], w.shape[0]) for _ in range(copies)]
        self.weight_buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, kind_of_buffer)
        for weight in self.weights:
            ggml.backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
        self.graphs: int | None = None

    def runs(self, x: Array) -> list[Callable[[], int]]:
        """One call per copy; all read the same input and write the same output memory."""
        ggml = self.ggml
        if self.graphs:
            ggml.backend_buffer_free(self.memory)
            ggml.free(self.graphs)
        self.graphs = ggml.init(InitParams(len(self.weights) * 8192 + (1 << 20), None, True))
        ends = ggml.init(InitParams(1 << 16, None, True))
        source = ggml.new_tensor_2d(ends, 0, self.in_features, len(x))
        ggml.new_tensor_2d(ends, 0, self.out_features, len(x))  # only so that its memory exists
        self.memory = ggml.backend_alloc_ctx_tensors_from_buft(ends, ggml.backend_cpu_buffer_type())
        ggml.backend_tensor_set(source, x.ctypes.data, 0, x.nbytes)
        address = ggml.backend_buffer_get_base(self.memory) + -(-x.nbytes // 64) * 64  # behind the source
        calls, self.rows = [], len(x)
        for weight in self.weights:
            self.product = product = ggml.mul_mat(self.graphs, weight, source)
            ggml.backend_tensor_alloc(self.memory, product, address)
            graph = ggml.new_graph_custom(self.graphs, 8, False)
            ggml.build_forward_expand(graph, product)
            calls.append(lambda graph=graph: ggml.backend_graph_compute(ggml.backend, graph))
        self.last = calls[-1]
        return calls

    def output(self) -> Array:
        """The result of a copy."""
        self.last()
        y = np.empty((self.rows, self.out_features), np.float32)
        self.ggml.backend_tensor_get(self.product, y.ctypes.data, 0, y.nbytes)
        return y
