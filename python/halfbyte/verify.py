"""`hb.verify`: the numeric contract, shown on the user's own data.

Each quantized module is checked on the inputs that it really gets, while the model runs, so nothing has to be kept. The
reference is plain torch in float64; `reference.py` derives the rounding bounds.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte._extension import available_capabilities, cpu_capability, set_cpu_capability
from halfbyte.calibration import Data, Forward, check_data, evaluating, run_batch
from halfbyte.errors import QuantizationError
from halfbyte.io.loading import load_
from halfbyte.io.saving import save
from halfbyte.io.skeleton import skeleton_of
from halfbyte.nn import QuantizedConv, QuantizedEmbedding, QuantizedLinear, QuantizedModule
from halfbyte.nn.packed_weight import WeightPacker
from halfbyte.outputs import output_tensors, same_bits
from halfbyte.planning import kernel_name
from halfbyte.reference import LinearReference, activation_codes, conv_reference, embedding_reference, linear_reference
from halfbyte.verification import ModelCheck, ModuleVerification, VerifyReport

_MAX_SAMPLES = 4  # of a convolution, each time it runs
_FLOAT32_INTEGERS = 2.0**23  # below it, y = s * T in float32 gives T back


def verify(model: nn.Module, data: Data, *, forward: Forward | None = None, max_rows: int = 64) -> VerifyReport:
    """Checks on your own data that a quantized model computes what its integers say, to the bit.

    For every quantized module, on the inputs it gets: every ISA level of this CPU and 1, 2 and all threads give equal bits;
    integer products equal exact ones; the result is within the rounding that its documented order of operations allows; and
    packing loses nothing. For the model as a whole: outputs stay the same on every level, with any number of threads, and
    after `save` and `load_`.

    The model runs in evaluation mode without gradients; its training flags, the ISA level, the number of threads and the
    random state come back as they were.

    Args:
        model: A quantized model.
        data: Batches, as in `quantize_`; a few are enough.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.
        max_rows: Rows of input that are checked each time a module runs, spread evenly; the check costs about as much as
            a float64 product of that many rows for each module, and a run of every level.

    Returns:
        The report. Nothing is raised for a failed check; `report.ok` says, `report.raise_if_failed()` raises.

    Raises:
        QuantizationError: no module is quantized, or there are no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> _ = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        >>> hb.verify(model, [torch.randn(16, 64)]).ok
        True
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass an nn.Module")
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} is not positive; use e.g. 64")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not modules:
        raise QuantizationError("the model has no integer modules: quantize it first, with hb.quantize_")
    data = check_data(data)
    settings = _Settings.of_this_process()
    watches = {name: _Watch(name, module, settings, max_rows) for name, module in modules.items()}
    whole = _WholeModel(settings)
    batches = 0
    with settings.restored(), evaluating(model), tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
        loaded = whole.reload(model, Path(folder) / "model.safetensors")
        for batch in data:
            whole.check(model, loaded, batch, run_batch if forward is None else forward, watches)
            batches += 1
    if batches == 0:
        raise QuantizationError("data gave no batches; if it is a generator, it was used up before: make a new one")
    verified = tuple(watch.result() for watch in watches.values())
    return VerifyReport(
        modules=verified,
        checks=whole.results(all(m.ok for m in verified)),
        levels=settings.levels,
        threads=settings.threads,
        batches=batches,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """The ISA levels and numbers of threads to compare, and those that were active."""

    levels: tuple[str, ...]
    threads: tuple[int, ...]
    level: str
    thread_count: int

    @staticmethod
    def of_this_process() -> _Settings:
        count = torch.get_num_threads()
        threads = tuple(sorted({1, 2, count, os.cpu_count() or 1}))
        return _Settings(tuple(available_capabilities()), threads, cpu_capability(), count)

    def use(self, level: str, threads: int) -> None:
        set_cpu_capability(level)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def use_own(self) -> None:
        self.use(self.level, self.thread_count)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Leaves level, threads and random state as they were, whatever happens inside."""
        state = torch.get_rng_state()
        try:
            yield
        finally:
            self.use_own()
            torch.set_rng_state(state)


class _Watch:
    """Checks one module each time it runs; a forward hook."""

    def __init__(self, name: str, module: QuantizedModule, settings: _Settings, max_rows: int) -> None:
        self._name, self._module, self._settings, self._max_rows = name, module, settings, max_rows
        self._calls = self._rows = self._integers = 0
        self._same = self._integers_equal = True
        self._worst = 0.0

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """Compares what the module gave with every level, every number of threads, and the reference."""
        x = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(x, Tensor) and isinstance(output, Tensor)
        self._calls += 1
        if isinstance(self._module, QuantizedConv):
            return self._check_conv(self._module, x, output)
        if isinstance(self._module, QuantizedEmbedding):
            rows, given = x.reshape(-1), output.reshape(-1, output.shape[-1])
        else:
            rows, given = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        some = _spread(rows.shape[0], self._max_rows)
        rows, given = rows[some], given[some]
        if not len(some):
            return
        self._rows += len(some)
        for threads, level in product(self._settings.threads, self._settings.levels):
            self._settings.use(level, threads)
            self._same &= same_bits(self._module.forward(rows), given)
        self._settings.use_own()
        if isinstance(self._module, QuantizedEmbedding):
            reference = embedding_reference(self._module, rows.to(torch.int64))
            self._integers_equal &= same_bits(reference, given)
        elif isinstance(self._module, QuantizedLinear):
            self._check_linear(self._module, rows, given)

    def _check_linear(self, module: QuantizedLinear, rows: Tensor, given: Tensor) -> None:
        finite = torch.isfinite(rows).all(dim=1)
        rows, given = rows[finite], given[finite]
        act_scale = activation_codes(module, rows)[1].double()
        integers = None if module.scheme.activation is None else _integer_products(module, rows, act_scale)
        for part in linear_reference(module, rows):
            self._compare(part, given, integers, act_scale)

    def _check_conv(self, module: QuantizedConv, x: Tensor, output: Tensor) -> None:
        """Whole samples in every setting, some of their results against the reference. Float products are torch's own."""
        single = x.dim() == module.geometry.dims + 1
        x, output = (x.unsqueeze(0), output.unsqueeze(0)) if single else (x, output)
        some = _spread(x.shape[0], _MAX_SAMPLES)
        x, output = x[some], output[some]
        results = output.movedim(1, -1).flatten(0, -2)
        pixels = _spread(results.shape[0], self._max_rows)
        if not len(pixels):
            return
        self._rows += len(pixels)
        if module.scheme.activation is not None:
            for threads, level in product(self._settings.threads, self._settings.levels):
                self._settings.use(level, threads)
                self._same &= same_bits(module.forward(x), output)
            self._settings.use_own()
        if module.geometry.output_size(x.shape[2:]) != tuple(output.shape[2:]) or not torch.isfinite(x).all():
            return  # a call with output_size, or with sums that are not finite
        integers, act_scale = None, torch.ones(len(pixels), 1, dtype=torch.float64)
        if module.scheme.activation is not None:
            of_sample = activation_codes(module, x.flatten(1))[1].double()
            act_scale = of_sample.repeat_interleave(results.shape[0] // x.shape[0], 0)[pixels]
            integers = _integer_results(module, x).movedim(1, -1).flatten(0, -2)[pixels]
            integers = torch.round(integers.double() / act_scale)
        for part in conv_reference(module, x, pixels):
            self._compare(part, results[pixels], integers, act_scale)

    def _compare(self, part: LinearReference, given: Tensor, integers: Tensor | None, act_scale: Tensor) -> None:
        difference = (given[:, part.outputs].double() - part.exact).abs()
        # A result past the largest number of its dtype has no rounding bound.
        difference = torch.where(part.exact.abs() < torch.finfo(given.dtype).max, difference, 0.0)
        self._worst = max(self._worst, _largest(difference / part.bound))
        if integers is not None and part.integers is not None and part.reach is not None:
            visible = (part.reach < _FLOAT32_INTEGERS) & (part.reach * act_scale < torch.finfo(torch.float32).max)
            self._integers += int(visible.sum())
            self._integers_equal &= bool((integers[:, part.outputs] == part.integers)[visible].all())

    def result(self) -> ModuleVerification:
        """What was found, packing included."""
        return ModuleVerification(
            name=self._name,
            kernel=kernel_name(self._module, self._module.scheme),
            calls=self._calls,
            rows=self._rows,
            same_everywhere=self._same,
            integers=self._integers,
            integers_equal=self._integers_equal,
            worst_rounding=self._worst,
            packing=_packing_is_lossless(self._module),
        )


def _integer_products(module: QuantizedLinear, rows: Tensor, act_scale: Tensor) -> Tensor:
    """What the kernel's integer sums were: with all weight scales 1 it gives `s * float(T)`, and `T` is read off.

    Exact while partial sums stay below 2^24, where float32 has every integer.
    """
    products = ops.linear_int8(
        module.clipped_input(rows).float(),
        module.qweight,
        torch.ones_like(module.scale),
        module.zero_point,
        None,
        bits=module.weight_format.bits,
        out_features=module.out_features,
        group_size=module.group_size,
        act_scale=module.act_scale,
        act_zero_point=module.act_zero_point,
        asymmetric=module.scheme.asymmetric_rows,
    )
    return torch.round(products.double() / act_scale)


def _integer_results(module: QuantizedConv, x: Tensor) -> Tensor:
    """The same for a convolution, still times the activation scale of each sample."""
    ones = copy.copy(module)
    ones._buffers = {**module._buffers, "scale": torch.ones_like(module.scale)}
    ones._parameters = {**module._parameters, "bias": None}
    return ones.forward(x.float())


def _packing_is_lossless(module: QuantizedModule) -> bool:
    packed, weight_format = module.packed_weight, module.weight_format
    codes = packed.codes(weight_format)
    low, high = (0, 1) if weight_format.binary else (weight_format.qmin, weight_format.qmax)
    if codes.codes.numel() and not low <= int(codes.codes.min()) <= int(codes.codes.max()) <= high:
        return False
    packer = WeightPacker(weight_format, packed.layout, packed.shape)
    packer.add(codes)
    again = packer.packed()
    return all(
        (a is None) == (b is None) and (a is None or b is None or same_bits(a, b))
        for a, b in zip(packed.tensors().values(), again.tensors().values(), strict=True)
    )


def _spread(count: int, limit: int) -> Tensor:
    if count <= limit:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit).round().to(torch.int64)


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


@dataclass(slots=True)
class _WholeModel:
    """Compares outputs of the model under other settings, and of its reloaded copy, with those under its own."""

    settings: _Settings
    differences: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def reload(self, model: nn.Module, path: Path) -> nn.Module | None:
        """Saves the model and loads it into a skeleton of its own; None, with a note, where it cannot be copied."""
        try:
            skeleton = skeleton_of(model)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            self.notes["save and load_"] = f"not checked: the model cannot be copied ({error})"
            return None
        save(model, path)
        return load_(skeleton, path).eval()

    def check(
        self, model: nn.Module, loaded: nn.Module | None, batch: object, run: Forward, watches: dict[str, _Watch]
    ) -> None:
        """Runs one batch in every setting."""
        state = torch.get_rng_state()

        def outputs_of(subject: nn.Module) -> dict[str, Tensor]:
            torch.set_rng_state(state)
            return output_tensors(run(subject, batch))

        # First of all hooks, to see what the module itself gave.
        handles = [
            model.get_submodule(name).register_forward_hook(watch, prepend=True, with_kwargs=True)
            for name, watch in watches.items()
        ]
        try:
            expected = outputs_of(model)
        finally:
            for handle in handles:
                handle.remove()
        self._compare("same settings, run again", expected, outputs_of(model))
        for level in set(self.settings.levels) - {self.settings.level}:
            self.settings.use(level, self.settings.thread_count)
            self._compare("ISA levels", expected, outputs_of(model))
        for threads in set(self.settings.threads) - {self.settings.thread_count}:
            self.settings.use(self.settings.level, threads)
            self._compare("threads", expected, outputs_of(model))
        self.settings.use_own()
        if loaded is not None:
            self._compare("save and load_", expected, outputs_of(loaded))

    def _compare(self, name: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        self.differences.setdefault(name, 0.0)
        if expected.keys() != found.keys():
            self.differences[name] = float("inf")
            return
        for key, tensor in expected.items():
            if not same_bits(tensor, found[key]):
                self.differences[name] = max(self.differences[name], _relative_difference(tensor, found[key]))

    def results(self, modules_ok: bool) -> tuple[ModelCheck, ...]:
        """The checks, with the differences between thread counts that torch's own float layers cause set apart."""
        checks = [ModelCheck(name=name, passed=True, note=note) for name, note in self.notes.items()]
        repeats = self.differences.get("same settings, run again") == 0
        for name, difference in self.differences.items():
            note, passed = "", difference == 0
            if not passed:
                note = f"outputs differ by {difference:.1e} (relative)"
                if not repeats:
                    note += ", but the model does not even repeat itself: it keeps state or draws numbers"
                elif name == "threads" and modules_ok:
                    passed, note = True, f"{note}: torch's float layers; every quantized module gave equal bits"
            checks.append(ModelCheck(name=name, passed=passed, note=note))
        return tuple(checks)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value; never 0, since the bits differ."""
    if a.shape != b.shape or not a.numel():
        return float("inf")
    difference = _largest((a.double() - b.double()).abs()) / max(_largest(a.double().abs()), 1e-300)
    return max(difference, 1e-300) if difference == difference else float("inf")
