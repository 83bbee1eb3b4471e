"""`hb.compare`: a quantized model against the float model it came from, on the user's own data.

All sums run in float64, one batch at a time, so memory does not grow with the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.calibration import Data, Forward, check_data, evaluating, run_batch
from halfbyte.confidence import margin_of_mean
from halfbyte.errors import QuantizationError
from halfbyte.outputs import Kind, attention_mask_of, is_logits, output_tensors
from halfbyte.parts import is_in_parts
from halfbyte.schemes import Scheme
from halfbyte.table import Table, fold_by_name
from halfbyte.targets import is_converted, is_target

_CHUNK = 1 << 20  # elements compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One output tensor over all batches.

    Attributes:
        name: Its name in the model's output; `output` where the model returns one tensor.
        elements: Elements compared.
        relative_error: `‖quantized - float‖ / ‖float‖`.
        max_abs_error: Largest difference of an element.
        cosine: Cosine of the angle between the two.
        positions: Distributions compared (rows of logits); 0 where the output is not one of logits.
        kl: Mean of `KL(float ‖ quantized)` over positions, in nats; None without positions.
        kl_margin: Half width of the 95 % confidence interval of that mean, positions taken as independent; None with less
            than two.
        top1_agreement: Part of the positions at which both have the same largest logit.
    """

    name: str
    elements: int
    relative_error: float
    max_abs_error: float
    cosine: float
    positions: int = 0
    kl: float | None = None
    kl_margin: float | None = None
    top1_agreement: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB: `-20 log10(relative_error)`; inf if nothing was lost."""
        return _decibel(self.relative_error)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "sqnr_db": self.sqnr_db}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleComparison:
    """One quantized module, given what its float counterpart gets in the float model: its own error, not what it inherits.

    Attributes:
        name: Qualified name.
        scheme: Its scheme, in words.
        calls: How often it ran.
        relative_error: `‖quantized(x) - float(x)‖ / ‖float(x)‖`, biases included; None if it never ran.
    """

    name: str
    scheme: str
    calls: int
    relative_error: float | None

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB."""
        return None if self.relative_error is None else _decibel(self.relative_error)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "sqnr_db": self.sqnr_db}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """What `compare` found; prints as two tables, shows as such in a notebook.

    Modules whose names differ only in numbers share a line, with the worst error; `modules` and `worst_modules` have each.

    Attributes:
        outputs: One entry for each tensor that the models return.
        modules: One entry for each quantized module, in the order of the model; the parts of recurrent and attention layers
            have none, since their float counterparts are no modules.
        batches: Batches of data that were run.
        seconds: Wall time.
    """

    outputs: tuple[OutputComparison, ...]
    modules: tuple[ModuleComparison, ...]
    batches: int
    seconds: float

    @property
    def worst_modules(self) -> tuple[ModuleComparison, ...]:
        """Modules that ran, largest own error first: where to spend bits."""
        ran = [m for m in self.modules if m.relative_error is not None]
        return tuple(sorted(ran, key=lambda m: -(m.relative_error or 0.0)))

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {
            "batches": self.batches,
            "seconds": self.seconds,
            "outputs": [o.to_dict() for o in self.outputs],
            "modules": [m.to_dict() for m in self.modules],
        }

    def _tables(self) -> tuple[Table, Table]:
        header = ["output", "rel. error", "SQNR dB", "max |error|", "cosine", "KL (nats)", "top-1", "positions"]
        outputs = Table(header, right=set(range(1, 8)))
        for o in self.outputs:
            margin = "" if o.kl_margin is None else f" ± {o.kl_margin:.1e}"
            kl = "" if o.kl is None else f"{o.kl:.3e}{margin}"
            top1 = "" if o.top1_agreement is None else f"{100 * o.top1_agreement:.2f} %"
            error, cosine = f"{o.relative_error:.2e}", f"{o.cosine:.6f}"
            positions = str(o.positions) if o.positions else ""
            outputs.add(o.name, error, f"{o.sqnr_db:.1f}", f"{o.max_abs_error:.2e}", cosine, kl, top1, positions)
        modules = Table(["module", "format", "calls", "rel. error", "SQNR dB"], right={2, 3, 4})
        for label, some in fold_by_name(self.modules, lambda m: m.name, lambda m: (m.scheme, m.calls == 0)):
            worst = max(some, key=lambda m: m.relative_error or 0.0)
            error = "never ran" if worst.relative_error is None else f"{worst.relative_error:.2e}"
            sqnr = "" if worst.sqnr_db is None else f"{worst.sqnr_db:.1f}"
            modules.add(label, worst.scheme, str(sum(m.calls for m in some)), error, sqnr)
        return outputs, modules

    def __str__(self) -> str:
        outputs, modules = self._tables()
        title = "modules on the float model's inputs"
        return f"{outputs.to_text()}\n\n{title}\n{modules.to_text()}"

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self._tables())


def compare(
    float_model: nn.Module,
    model: nn.Module,
    data: Data,
    *,
    forward: Forward | None = None,
    kind: Kind | None = None,
) -> CompareReport:
    """Runs a quantized model and its float original on the same data, and says how far apart they are and why.

    Both run in evaluation mode without gradients, with the same random numbers. Positions that an `attention_mask` in a batch
    leaves out are not counted.

    Args:
        float_model: The model before quantization, for example `copy.deepcopy(model)` made then.
        model: The quantized model.
        data: Batches, as in `quantize_`.
        forward: `forward(model, batch)`, for batches that are not arguments of the models.
        kind: "logits": compare outputs as distributions over their last dimension too (KL divergence, top-1 agreement);
            "regression": do not. None: outputs named `logits`, or else those with two or more values in the last dimension
            that are not hidden states by name.

    Returns:
        Per output: relative error, SQNR, largest error, cosine, KL and top-1 agreement; per quantized module: its own error
        on the float model's inputs.

    Raises:
        QuantizationError: `float_model` is quantized, `model` is not, the two are not the same architecture or return
            different things, or there are no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> original = copy.deepcopy(model)
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> hb.compare(original, model, [torch.randn(16, 64)]).outputs[0].relative_error < 0.05
        True
    """
    start = time.perf_counter()
    if kind not in (None, "logits", "regression"):
        raise ValueError(f"kind={kind!r} is unknown; use 'logits', 'regression' or None")
    pairs = _pairs(float_model, model)
    run = run_batch if forward is None else forward
    outputs: dict[str, _OutputSums] = {}
    own = {name: _OwnError(quantized) for name, (_, quantized) in pairs.items()}
    batches = 0
    random_state = torch.get_rng_state()
    handles = [original.register_forward_hook(own[name], prepend=True) for name, (original, _) in pairs.items()]
    try:
        with evaluating(float_model), evaluating(model):
            for batch in check_data(data):
                state = torch.get_rng_state()
                expected = output_tensors(run(float_model, batch))
                torch.set_rng_state(state)
                found = output_tensors(run(model, batch))
                _add(outputs, expected, found, attention_mask_of(batch), kind)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
        torch.set_rng_state(random_state)
    if batches == 0:
        raise QuantizationError("data gave no batches; if it is a generator, it was used up before: make a new one")
    return CompareReport(
        outputs=tuple(sums.result(name) for name, sums in outputs.items()),
        modules=tuple(error.result(name) for name, error in own.items()),
        batches=batches,
        seconds=time.perf_counter() - start,
    )


def _pairs(float_model: nn.Module, model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    for argument, value in (("float_model", float_model), ("model", model)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"{argument} is a {type(value).__name__}; pass an nn.Module")
    originals = dict(float_model.named_modules())
    for name, module in originals.items():
        if is_converted(module):
            raise QuantizationError(
                f"float_model is quantized ({name or 'itself'}): quantize_ works in place, so keep the original with "
                "copy.deepcopy(model) before"
            )
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    wholes = tuple(f"{name}." for name, module in model.named_modules() if is_in_parts(module))
    converted = {name: module for name, module in model.named_modules() if is_converted(module)}
    for name, module in converted.items():
        original = originals.get(name)
        if original is None and name.startswith(wholes):
            continue  # a part of an LSTM, say: its float counterpart is no module of its own
        if original is None or not is_target(original):
            raise QuantizationError(
                f"float_model has no Linear or Embedding named {name}; pass the model that was quantized"
            )
        pairs[name] = (original, module)
    if not converted:
        raise QuantizationError("model has no quantized modules; the order is compare(float_model, model, data)")
    return pairs


def _add(
    outputs: dict[str, _OutputSums],
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    mask: Tensor | None,
    kind: Kind | None,
) -> None:
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (expected, found)]
    if shapes[0] != shapes[1]:
        raise QuantizationError(f"the models return different things: {shapes[0]} in float, {shapes[1]} quantized")
    floats = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    if not floats:
        raise QuantizationError(
            "the models return no floating-point tensor that could be compared; return it with forward=lambda model, batch: ..."
        )
    for name in floats:
        reference, quantized = expected[name], found[name]
        logits = is_logits(name, reference, floats, kind)
        if mask is not None and reference.dim() >= 2 and reference.shape[:2] == mask.shape:
            reference, quantized = reference[mask], quantized[mask]
        outputs.setdefault(name, _OutputSums()).add(reference, quantized, logits)


class _OutputSums:
    """Running sums of one output."""

    def __init__(self) -> None:
        self._elements = 0
        self._error = self._signal = self._quantized = self._product = self._largest = 0.0
        self._positions = self._agreements = 0
        self._kl = self._kl_squares = 0.0

    def add(self, reference: Tensor, quantized: Tensor, logits: bool) -> None:
        """Adds a batch; some rows at a time, in float64."""
        width = reference.shape[-1] if reference.dim() else 1
        for a, b in _row_chunks(reference.reshape(-1, max(width, 1)), quantized.reshape(-1, max(width, 1))):
            self._add_values(a, b)
            if logits:
                self._add_distributions(a, b)

    def _add_values(self, a: Tensor, b: Tensor) -> None:
        finite = torch.isfinite(a)  # masked logits are -inf in both
        difference = torch.where(finite, b - a, 0.0)
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        self._elements += int(finite.sum())
        self._error += float(difference.square().sum())
        self._signal += float(a.square().sum())
        self._quantized += float(b.square().sum())
        self._product += float((a * b).sum())
        self._largest = max(self._largest, float(difference.abs().amax()))

    def _add_distributions(self, a: Tensor, b: Tensor) -> None:
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        self._positions += kl.numel()
        self._kl += float(kl.sum())
        self._kl_squares += float(kl.square().sum())
        self._agreements += int((a.argmax(-1) == b.argmax(-1)).sum())

    def result(self, name: str) -> OutputComparison:
        """The figures."""
        n = self._positions
        kl = margin = agreement = None
        if n:
            kl, agreement = self._kl / n, self._agreements / n
        if n > 1 and kl is not None:
            variance = max(self._kl_squares / n - kl * kl, 0.0) * n / (n - 1)
            margin = margin_of_mean(math.sqrt(variance), n)
        norms = math.sqrt(self._signal * self._quantized)
        return OutputComparison(
            name=name,
            elements=self._elements,
            relative_error=_ratio(self._error, self._signal),
            max_abs_error=self._largest,
            cosine=self._product / norms if norms > 0 else float(self._signal == self._quantized),
            positions=n,
            kl=kl,
            kl_margin=margin,
            top1_agreement=agreement,
        )


class _OwnError:
    """Runs a quantized module on what its float counterpart gets; a forward hook of the latter."""

    def __init__(self, quantized: nn.Module) -> None:
        self._quantized = quantized
        self._calls = 0
        self._error = self._signal = 0.0

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Adds one call."""
        if not args or not isinstance(output, Tensor):
            return
        given = self._quantized.forward(*args)
        width = output.shape[-1]
        for a, b in _row_chunks(output.reshape(-1, width), given.reshape(-1, width)):
            self._error += float((b - a).square().sum())
            self._signal += float(a.square().sum())
        self._calls += 1

    def result(self, name: str) -> ModuleComparison:
        """The figures."""
        error = _ratio(self._error, self._signal) if self._calls else None
        scheme = self._quantized.scheme
        assert isinstance(scheme, Scheme)
        table = hasattr(self._quantized, "num_embeddings")  # which has no activations to speak of
        return ModuleComparison(
            name=name, scheme=str(scheme.weight if table else scheme), calls=self._calls, relative_error=error
        )


def _row_chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // max(a.shape[1], 1))
    for begin in range(0, a.shape[0], rows):
        yield a[begin : begin + rows].double(), b[begin : begin + rows].double()


def _ratio(error: float, signal: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / signal) if signal > 0 else math.inf


def _decibel(relative_error: float) -> float:
    if relative_error == 0:
        return math.inf
    return -20 * math.log10(relative_error) if math.isfinite(relative_error) else -math.inf
