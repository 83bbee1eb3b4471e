"""Steps for the stages of one program: values in the forms that are needed, in the graph's order."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch.fx import Node

from halfbyte.lowering.operators import AveragePool, Concat, Context, MaxPool, Product, Relabel, Same, Select, sizes3
from halfbyte.lowering.program import Activation, ActivationKind, ProgramBuilder, Results, Value, Window
from halfbyte.lowering.stages import Division, Epilogue, Form, Stage, layout, trivial

FLOAT_BYTES = 4


class Emission:
    """One program.

    Args:
        level: Which of the division's.
        division: All stages.
        context: The captured graph.
        exported: Nodes whose floats are needed outside the program.

    Attributes:
        inputs: Float values that the program reads.
        outputs: Values that it gives.
    """

    def __init__(self, level: int, division: Division, context: Context, exported: Iterable[Node]) -> None:
        self.stages = [stage for stage in division.stages.values() if stage.level == level]
        self._own = {stage.node: stage for stage in self.stages}
        self._context = context
        self.outputs = [stage.node for stage in self.stages if stage.node in set(exported)]
        self.inputs: list[Node] = []
        self._needed: dict[Node, dict[Form, None]] = {}
        self._values: dict[tuple[Node, Form], Value] = {}
        self.builder = ProgramBuilder()
        self._find_needed_forms()
        for stage in self.stages:
            self._emit(stage)

    # Which forms: from the results backwards.

    def _form(self, node: Node, form: Form) -> Form:
        return Form(form.qparams, form.last and not trivial(node, self._context))

    def _need(self, node: Node, form: Form) -> None:
        self._needed.setdefault(node, {})[self._form(node, form)] = None

    def _find_needed_forms(self) -> None:
        for node in self.outputs:
            last = bool(layout(node, self._context))
            self._need(node, Form(None, last))
            self.builder.output(self._shape(node), last)
        for stage in reversed(self.stages):
            natural = {Form(form.qparams, stage.last): None for form in self._needed.get(stage.node, {})}
            work = stage.work
            if isinstance(work, Epilogue):
                if work.product is not None:
                    self._need(work.product.x, Form(work.product.qparams, not work.product.rows))
                if work.x is not None:
                    self._need(work.x, Form(None, stage.last))
                if work.added is not None:
                    self._need(work.added, Form(None, stage.last))
                continue
            for form in natural:
                if isinstance(work, Concat):
                    for x in work.xs:
                        self._need(x, Form(form.qparams, True))
                elif isinstance(work, Same):
                    self._need(work.x, form)
                elif isinstance(work, Relabel):
                    self._need(work.x, Form(form.qparams, work.last_in))
                elif isinstance(work, AveragePool):
                    self._need(work.x, Form(None, True))
                else:
                    self._need(work.x, Form(form.qparams, True))

    # Steps.

    def _shape(self, node: Node) -> tuple[int, ...]:
        shape = self._context.shape(node)
        assert shape is not None
        return shape

    def _sizes(self, node: Node, last: bool) -> tuple[int, int]:
        """Channels and pixels; of contiguous memory any two numbers with the same product."""
        shape = self._shape(node)
        if last or len(shape) < 2:
            return (shape[0], prod(shape[1:])) if shape else (1, 1)
        return shape[-1], prod(shape[:-1])

    def _memory(self, node: Node, form: Form) -> Value:
        return self.builder.value(prod(self._shape(node)) * (FLOAT_BYTES if form.qparams is None else 1))

    def _get(self, node: Node, form: Form) -> Value:
        form = self._form(node, form)
        if (node, form) not in self._values:
            self._load(node, form)
        return self._values[node, form]

    def _load(self, node: Node, form: Form) -> None:
        """From another program, or from a float part."""
        assert node not in self._own, f"{node} is not there as {form}"
        if node not in self.inputs:
            self.inputs.append(node)
        value, index = self._memory(node, form), self.inputs.index(node)
        channels, pixels = self._sizes(node, form.last)
        if form.qparams is None:
            self.builder.load(index, not form.last, channels, pixels, value)
        else:
            self.builder.quantize(index, not form.last, channels, pixels, value, form.qparams)
        self._values[node, form] = value

    def _leaves(self, node: Node, form: Form) -> bool:
        return node in self.outputs and form == self._form(node, Form(None, bool(layout(node, self._context))))

    def _result(self, node: Node, form: Form) -> Value:
        """Where a value goes: floats that leave the program in this layout go to a result at once."""
        if self._leaves(node, form):
            at = self.outputs.index(node)
            value = Value(FLOAT_BYTES * prod(self._shape(node)), output=at)
        else:
            value = self._memory(node, form)
        self._values[node, form] = value
        return value

    def _emit(self, stage: Stage) -> None:
        node, work = stage.node, stage.work
        needed = self._needed.get(node, {})
        natural = list(dict.fromkeys(Form(form.qparams, stage.last) for form in needed))
        if isinstance(work, Epilogue):
            self._emit_epilogue(stage, work, natural)
        else:
            for form in natural:
                self._emit_form(node, work, form)
        for form in needed:
            if form.last != stage.last:
                x, y = self._values[node, Form(form.qparams, stage.last)], self._result(node, form)
                channels, pixels = self._sizes(node, True)
                if form.last:  # [channels, pixels] to [pixels, channels]
                    channels, pixels = pixels, channels
                self.builder.turn(x, y, form.qparams is None, channels, pixels)

    def _emit_epilogue(self, stage: Stage, work: Epilogue, forms: list[Form]) -> None:
        node = stage.node
        codes = [form for form in forms if form.qparams is not None]
        floats = Form(None, stage.last)
        results = Results(activation=work.activation)
        if codes:
            assert codes[0].qparams is not None
            results.codes, results.qparams = self._result(node, codes[0]), codes[0].qparams
        if floats in forms or len(codes) > 1:
            results.floats = self._result(node, floats)
        if work.activation.kind == ActivationKind.CLAMP and results.floats is None:
            # Rounding is monotonic: clamping codes is quantizing the clamped float.
            low, high = (results.qparams.code(bound) for bound in (work.activation.low, work.activation.high))
            results.code_range, results.activation = (low, high), Activation()
        if work.added is not None:
            results.added = self._get(work.added, floats)
        if work.product is not None:
            self._emit_product(work.product, results)
        else:
            assert work.x is not None
            self.builder.finish(self._get(work.x, floats), *self._sizes(node, stage.last), results)
        for form in codes[1:]:
            assert form.qparams is not None and results.floats is not None
            more = Results(codes=self._result(node, form), qparams=form.qparams)
            self.builder.finish(results.floats, *self._sizes(node, stage.last), more)

    def _emit_product(self, product: Product, results: Results) -> None:
        constants = []
        for node in product.constants:
            name, tensor = ("", None) if node is None else self._context.constants[node]
            constants.append(self.builder.constant(name, tensor))
        self.builder.conv(
            self._get(product.x, Form(product.qparams, not product.rows)),
            product.qparams,
            product.channels,
            product.groups,
            product.window,
            product.transposed,
            (product.bits, product.group_size),
            constants,
            results,
        )

    def _emit_form(
        self, node: Node, work: MaxPool | AveragePool | Concat | Select | Same | Relabel, form: Form
    ) -> None:
        if isinstance(work, Same | Relabel):
            last_in = form.last if isinstance(work, Same) else work.last_in
            value = self._get(work.x, Form(form.qparams, last_in))
            self._values[node, form] = value
            if self._leaves(node, form):  # a result has memory of its own
                self.builder.finish(value, *self._sizes(node, form.last), Results(floats=self._result(node, form)))
            return
        y, size = self._result(node, form), FLOAT_BYTES if form.qparams is None else 1
        if isinstance(work, MaxPool):
            x = self._get(work.x, Form(form.qparams, True))
            self.builder.max_pool(x, y, form.qparams is None, work.channels, work.window)
        elif isinstance(work, AveragePool):
            pooled = self.builder.value(FLOAT_BYTES * prod(self._shape(node))) if form.qparams is not None else y
            divisor = self.builder.constant("divisor", torch.tensor(work.divisors))
            self.builder.average_pool(self._get(work.x, Form(None, True)), pooled, work.channels, work.window, divisor)
            if form.qparams is not None:
                self.builder.finish(pooled, *self._sizes(node, form.last), Results(codes=y, qparams=form.qparams))
        elif isinstance(work, Concat):
            shift, stride = 0, self._shape(node)[0] * size
            window = Window(*(sizes3(self._shape(node)[1:]),) * 2)
            sources = self.builder.constant("sources", _table(i for n in window.size_out for i in range(n)))
            for part in work.xs:
                count = self._shape(part)[0] * size
                value = self._get(part, Form(form.qparams, True))
                self.builder.copy(value, y, window, sources, (count, stride), count, (0, shift))
                shift += count
        else:
            self._emit_select(work, y, form, size)

    def _emit_select(self, work: Select, y: Value, form: Form, size: int) -> None:
        x = self._get(work.x, Form(form.qparams, True))
        first_in, first_out, count, channels = work.channels
        strides = (self._shape(work.x)[0] * size, channels * size)
        fill = 0 if form.qparams is None else form.qparams.zero_point
        if count < channels:
            nothing = self.builder.constant("sources", _table(-1 for _ in work.sources))
            empty = Window((0, 0, 0), work.window.size_out)
            self.builder.copy(x, y, empty, nothing, (strides[1], strides[1]), strides[1], fill=fill)
        sources = self.builder.constant("sources", _table(work.sources))
        shifts = (first_in * size, first_out * size)
        self.builder.copy(x, y, work.window, sources, strides, count * size, shifts, fill)


def _table(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
