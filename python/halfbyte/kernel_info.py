"""`hb.kernel_info`: which kernel computes each module, and on what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from halfbyte import _C
from halfbyte._extension import cpu_capability
from halfbyte.errors import QuantizationError
from halfbyte.nn import HalfConv, QuantizedConv, QuantizedEmbedding, QuantizedModule
from halfbyte.nn.packed_weight import PANEL
from halfbyte.ops.packing import unit_inputs
from halfbyte.planning import kernel_name
from halfbyte.table import Table, fold_by_name, format_bytes
from halfbyte.targets import is_converted


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleKernel:
    """What runs for one module.

    Attributes:
        name: Qualified name; empty for a module given alone.
        operator: The operator behind it: `torch.ops.halfbyte.<operator>`, or torch's own for 16-bit floats.
        kernel: Operation, weight codes, activations, ISA level.
        level: ISA level that is active now, or `torch`.
        layout: Layout of the codes: `tiles`, `rows`, or empty for floats.
        tile: What the kernel reads at a time: outputs x inputs of one unit of the tiles layout, or a row.
        register_tile: What it computes at a time with many tokens: tokens x outputs; empty where nothing is multiplied here.
        bytes: Codes, scales and zero points (or the 16-bit weight); 0 where an earlier module holds the same tensors.
    """

    name: str
    operator: str
    kernel: str
    level: str
    layout: str
    tile: str
    register_tile: str
    bytes: int

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What `kernel_info` returns; prints as a table, shows as one in a notebook.

    Attributes:
        modules: One entry for each quantized module.
    """

    modules: tuple[ModuleKernel, ...]

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {"modules": [module.to_dict() for module in self.modules]}

    def _table(self) -> Table:
        table = Table(["module", "operator", "kernel", "level", "layout", "tile", "registers", "bytes"], right={7})

        def shown(m: ModuleKernel) -> tuple[str, ...]:
            return m.operator, m.kernel, m.level, m.layout, m.tile, m.register_tile, "" if m.bytes else "shared"

        for label, modules in fold_by_name(self.modules, lambda m: m.name, shown):
            *cells, shared = shown(modules[0])
            table.add(label or "(module)", *cells, shared or format_bytes(sum(m.bytes for m in modules)))
        table.total("total", "", "", "", "", "", "", format_bytes(sum(m.bytes for m in self.modules)))
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def kernel_info(module: nn.Module) -> KernelInfo:
    """Lists operator, kernel, ISA level, layout, tile and bytes of each quantized module.

    Args:
        module: A quantized model, or one quantized module.

    Returns:
        One entry for each quantized module, as things stand now: a level forced later changes it.

    Raises:
        QuantizationError: nothing in it is quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> info = hb.kernel_info(model).modules[0]
        >>> info.operator, info.layout, info.tile, info.bytes
        ('linear_int8', 'tiles', '16 x 4', 2176)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; pass an nn.Module")
    seen: set[int] = set()
    entries = tuple(_entry(name, m, seen) for name, m in module.named_modules() if is_converted(m))
    if not entries:
        raise QuantizationError("nothing is quantized; hb.plan says what would run before quantizing")
    return KernelInfo(entries)


def _entry(name: str, module: nn.Module, seen: set[int]) -> ModuleKernel:
    if not isinstance(module, QuantizedModule):
        weight, kind = module._parameters["weight"], "embedding" if hasattr(module, "num_embeddings") else "linear"
        kind = "conv" if isinstance(module, HalfConv) else kind
        assert weight is not None
        dtype = str(weight.dtype).removeprefix("torch.")
        size = 0 if id(weight) in seen else weight.nbytes
        seen.add(id(weight))
        return ModuleKernel(
            name=name,
            operator=f"torch {kind}",
            kernel=f"{kind} {dtype}",
            level="torch",
            layout="",
            tile="",
            register_tile="",
            bytes=size,
        )
    tensors = [t for t in module.packed_weight.tensors().values() if t is not None]
    size = sum(t.nbytes for t in tensors if id(t) not in seen)
    seen.update(id(t) for t in tensors)
    bits = module.weight_format.bits
    if isinstance(module, QuantizedEmbedding):
        operator = "embedding_weight_only"
    else:
        kind = "conv" if isinstance(module, QuantizedConv) else "linear"
        operator = f"{kind}_weight_only" if module.scheme.activation is None else f"{kind}_int8"
    tiles = module.layout == "tiles"
    tile = f"{PANEL} x {unit_inputs(bits)}" if tiles else f"1 x {module.packed_weight.shape[1]}"
    return ModuleKernel(
        name=name,
        operator=operator,
        kernel=kernel_name(module, module.scheme),
        level=cpu_capability(),
        layout=module.layout,
        tile=tile,
        register_tile=_register_tile(operator),
        bytes=size,
    )


def _register_tile(operator: str) -> str:
    int8_rows, float_rows, outputs = _C.matmul_tile()
    rows = {"linear_int8": int8_rows, "linear_weight_only": float_rows}.get(operator)
    return "" if rows is None else f"{rows} x {outputs}"
