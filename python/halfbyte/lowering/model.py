"""The lowered model: a module over programs and torch's operators, and the report on what became of each node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from halfbyte.table import Table, fold_by_name


@dataclass(frozen=True, slots=True)
class LoweredNode:
    """One operation of the model.

    Attributes:
        node: Its name in the graph that `torch.export` makes.
        module: Qualified name of the module that computes it; empty for the model itself.
        operator: Such as `halfbyte.conv_int8` or `aten.silu`.
        kind: Whether it is computed inside an integer program, or as the model computes it.
        reason: Why it stays float.
    """

    node: str
    module: str
    operator: str
    kind: Literal["integer", "float"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LoweringReport:
    """What `hb.lower` did; prints as a table of what stays float.

    Attributes:
        nodes: Every operation on tensors, in the order of the graph.
        programs: Number of integer programs; between two of them something is float.
    """

    nodes: tuple[LoweredNode, ...]
    programs: int

    @property
    def floats(self) -> tuple[LoweredNode, ...]:
        """What stays as it was."""
        return tuple(node for node in self.nodes if node.kind == "float")

    def _table(self) -> Table:
        table = Table(["module", "operator", "reason"])
        folded = fold_by_name(self.floats, lambda n: n.module, lambda n: (n.operator, n.reason))
        for label, nodes in folded:
            table.add(label, nodes[0].operator, nodes[0].reason)
        integers = len(self.nodes) - len(self.floats)
        table.total("total", f"{integers} integer, {len(self.floats)} float", f"programs: {self.programs}")
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a tensor input must be.

    Attributes:
        name: Of the argument.
        sizes: Without the batch where `batch` is None.
        batch: The batch size if it is fixed, or if the first dimension is none (then it is that size).
        dtype: Its dtype.
        last: Whether float parts of the model need it channels last in memory (True) or contiguous (False); None if none
            reads it.
    """

    name: str
    sizes: tuple[int, ...]
    batch: int | None
    dtype: torch.dtype
    last: bool | None

    def check(self, x: object) -> Tensor:
        """The tensor in the layout that is needed.

        Raises:
            TypeError: No tensor, or another dtype.
            ValueError: Other sizes.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name} is a {type(x).__name__}; the model was lowered for a tensor")
        if x.dtype != self.dtype:
            raise TypeError(f"{self.name} has dtype {x.dtype}; the model was lowered for {self.dtype}")
        free = self.batch is None
        if x.dim() != len(self.sizes) + free or tuple(x.shape[int(free) :]) != self.sizes:
            wanted = ", ".join((["N"] if free else []) + [str(size) for size in self.sizes])
            raise ValueError(f"{self.name} has shape {tuple(x.shape)}; the model was lowered for [{wanted}]")
        if self.last is None or x.dim() < 3 or torch.compiler.is_compiling():
            return x
        if self.last:
            return x if x.movedim(1, -1).is_contiguous() else x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.contiguous()


class LoweredModel(nn.Module):
    """A model whose integers stay integers between layers; `hb.lower` makes it.

    It is for inference: no gradients, always in evaluation mode. Weights are shared with the model it was made of. It can be
    copied, pickled and compiled; for files, save the converted model with `hb.save` and lower it again.

    Args:
        body: The graph, tensors in and tensors out.
        inputs: What each of the flattened arguments must be; the value itself for what is no tensor.
        in_spec, out_spec: Trees of arguments and results.
        report: What became of each node.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        inputs: Sequence[object],
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        report: LoweringReport,
    ) -> None:
        super().__init__()
        self.body = body
        self.report = report
        self._inputs = list(inputs)
        self._in_spec, self._out_spec = in_spec, out_spec
        single = pytree.tree_structure(((0,), {}))
        self._one_in = in_spec == single and isinstance(inputs[0], InputSpec)
        self._one_out = out_spec == pytree.tree_structure(0)
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> object:
        """As the model that was lowered.

        Raises:
            TypeError: An argument is of another kind than in the example.
            ValueError: A tensor has other sizes than in the example, the batch left out.
        """
        if self._one_in and len(args) == 1 and not kwargs:
            tensors = [self._inputs[0].check(args[0])]  # type: ignore[attr-defined]
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._in_spec:
                raise TypeError(f"the arguments are {spec}; the model was lowered for {self._in_spec}")
            tensors = []
            for leaf, wanted in zip(leaves, self._inputs, strict=True):
                if isinstance(wanted, InputSpec):
                    tensors.append(wanted.check(leaf))
                elif leaf != wanted:
                    raise ValueError(f"an argument is {leaf!r}; the model was lowered for {wanted!r}")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError("a lowered model gives no gradients; use the converted model, or torch.no_grad()")
        with torch.no_grad():
            results = self.body(*tensors)
        return results[0] if self._one_out else pytree.tree_unflatten(results, self._out_spec)

    def train(self, mode: bool = True) -> LoweredModel:
        """Evaluation mode is the only one.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError("a lowered model is for inference only; train the model it was made of")
        return super().train(False)
