"""Fast estimates of sensitivity: no configuration is run, one pass over the data serves every unit and scheme.

Each gives, for a unit u and a candidate s with weight error D = W_s - W, a number whose sum over units should grow with
the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from halfbyte.calibration import Forward, evaluating, run_batch
from halfbyte.errors import QuantizationError
from halfbyte.nn import HalfConv, HalfEmbedding, HalfLinear, QuantizedModule
from halfbyte.outputs import is_logits, output_tensors
from halfbyte.progress import track
from halfbyte.search.bench import FLOAT, Workbench

Proxy = Literal["fisher", "trace", "output_error"]
Scores = dict[str, dict[str, float]]


def proxy_scores(
    bench: Workbench,
    batches: Sequence[object],
    proxy: Proxy,
    *,
    forward: Forward | None = None,
    seed: int = 0,
    samples: int = 8,
    progress: bool = True,
) -> Scores:
    """Scores of every unit and candidate.

    Args:
        bench: The model with its candidates.
        batches: Data; the smaller each batch, the more the Fisher estimate is worth.
        proxy: "fisher": `(g . D)^2 / 2`, g the gradient of the log-likelihood of an output drawn from the model itself: the
            second order of the KL divergence, in expectation. "trace": HAWQ-V2's `tr(H) / n * |D|^2` with Hutchinson's
            estimate of the trace of the Hessian. "output_error": squared error of the module's own output relative to it, on
            float inputs: what GPTQ's Hessian gives.
        forward: As in `quantize_`.
        seed: For the drawn outputs and probes.
        samples: Draws ("fisher") or probes ("trace") a batch.
        progress: Show a progress bar on stderr.

    Returns:
        Unit name to candidate key to score; 0 for floating point.

    Sources: Dong et al., HAWQ-V2 (2020); Singh and Alistarh, WoodFisher (2020).
    """
    run = run_batch if forward is None else forward
    bench.apply({})
    if proxy == "output_error":
        return _output_error(bench, batches, run, progress)
    if proxy not in ("fisher", "trace"):
        raise ValueError(f"proxy={proxy!r} is unknown; use 'fisher', 'trace' or 'output_error'")
    if proxy == "fisher":
        return _fisher(bench, batches, run, seed, samples, progress)
    return _trace(bench, batches, run, seed, samples, progress)


def _weights(bench: Workbench) -> dict[str, dict[str, nn.Parameter]]:
    """Unit to the name of each weight matrix in it to the matrix; a shared one once."""
    seen: set[int] = set()
    found: dict[str, dict[str, nn.Parameter]] = {}
    for unit in bench.units:
        found[unit.name] = {}
        for name, module in bench.candidates[unit.name][FLOAT].modules.items():
            for parameter_name, parameter in module.named_parameters():
                if parameter.dim() >= 2 and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[unit.name][f"{name}.{parameter_name}"] = parameter
    return found


def _weight_error(bench: Workbench, unit: str, key: str, name: str, weight: Tensor) -> Tensor:
    """`W_s - W` of a weight `module.weight` under a candidate, float32."""
    module_name, _, parameter = name.rpartition(".")
    module = bench.candidates[unit][key].modules.get(module_name)
    if not isinstance(module, QuantizedModule | HalfLinear | HalfConv | HalfEmbedding) or parameter != "weight":
        raise QuantizationError(
            f"{module_name}: this proxy needs modules with one weight; use proxy='output_error' or method='measure'"
        )
    rounded = module.weight
    assert isinstance(rounded, Tensor)
    return rounded.detach().float() - weight.detach().float()


def _logits(output: object) -> Tensor:
    tensors = {name: t for name, t in output_tensors(output).items() if t.is_floating_point()}
    for name, tensor in tensors.items():
        if is_logits(name, tensor, list(tensors), None):
            return tensor.reshape(-1, tensor.shape[-1]).float()
    raise QuantizationError(f"the outputs {', '.join(tensors)} are not logits, which this proxy needs")


@contextmanager
def _requiring(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


def _fisher(
    bench: Workbench,
    batches: Sequence[object],
    run: Callable[[nn.Module, object], object],
    seed: int,
    samples: int,
    progress: bool,
) -> Scores:
    weights = _weights(bench)
    parameters = [p for named in weights.values() for p in named.values()]
    scores: Scores = {unit: dict.fromkeys(candidates, 0.0) for unit, candidates in bench.candidates.items()}
    generator = torch.Generator().manual_seed(seed)
    positions = 0
    with evaluating(bench.model), torch.enable_grad(), _requiring(parameters):
        for batch in track(batches, "estimating", total=len(batches), enabled=progress):
            log_p = _logits(run(bench.model, batch)).log_softmax(-1)
            for draw in range(samples):
                target = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                likelihood = log_p.gather(1, target).sum()
                gradients = torch.autograd.grad(
                    likelihood, parameters, retain_graph=draw + 1 < samples, allow_unused=True
                )
                _add_fisher(bench, weights, gradients, scores)
            positions += samples * log_p.shape[0]
    return {unit: {key: value / positions for key, value in row.items()} for unit, row in scores.items()}


def _add_fisher(
    bench: Workbench,
    weights: dict[str, dict[str, nn.Parameter]],
    gradients: Sequence[Tensor | None],
    scores: Scores,
) -> None:
    each = iter(gradients)
    for unit, named in weights.items():
        found = {name: next(each) for name in named}
        for key in bench.candidates[unit]:
            if key == FLOAT:
                continue
            change = 0.0
            for name, weight in named.items():
                gradient = found[name]
                if gradient is not None:
                    change += float((gradient * _weight_error(bench, unit, key, name, weight)).sum())
            scores[unit][key] += 0.5 * change * change


def _trace(
    bench: Workbench,
    batches: Sequence[object],
    run: Callable[[nn.Module, object], object],
    seed: int,
    probes: int,
    progress: bool,
) -> Scores:
    """`tr(H)` of the mean cross-entropy to the model's own most likely outputs, by `z^T H z` with z = ±1."""
    weights = _weights(bench)
    parameters = [p for named in weights.values() for p in named.values()]
    traces = dict.fromkeys(weights, 0.0)
    generator = torch.Generator().manual_seed(seed)
    with (
        evaluating(bench.model),
        torch.enable_grad(),
        _requiring(parameters),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),  # the others have no second derivative
    ):
        for batch in track(batches, "estimating", total=len(batches), enabled=progress):
            logits = _logits(run(bench.model, batch))
            loss = nn.functional.cross_entropy(logits, logits.detach().argmax(-1))
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            for probe in range(probes):
                signs = [torch.randint(0, 2, p.shape, generator=generator).float().mul_(2).sub_(1) for p in parameters]
                inner = sum((g * z).sum() for g, z in zip(gradients, signs, strict=True) if g is not None)
                assert isinstance(inner, Tensor)
                products = torch.autograd.grad(inner, parameters, retain_graph=probe + 1 < probes, allow_unused=True)
                each = iter(zip(products, signs, strict=True))
                for unit, named in weights.items():
                    for _ in named:
                        product, z = next(each)
                        if product is not None:
                            traces[unit] += float((product * z).sum()) / (probes * len(batches))
    known = [trace for trace in traces.values() if trace > 0]
    least = 1e-3 * sum(known) / max(len(known), 1)  # for estimates that noise made negative: more bits are never worse
    scores: Scores = {}
    for unit, named in weights.items():
        n = sum(weight.numel() for weight in named.values())
        scores[unit] = {FLOAT: 0.0}
        for key in bench.candidates[unit]:
            if key != FLOAT:
                error = sum(float(_weight_error(bench, unit, key, m, w).square().sum()) for m, w in named.items())
                scores[unit][key] = max(traces[unit], least) / n * error
    return scores


def _output_error(
    bench: Workbench, batches: Sequence[object], run: Callable[[nn.Module, object], object], progress: bool
) -> Scores:
    errors: Scores = {unit: dict.fromkeys(candidates, 0.0) for unit, candidates in bench.candidates.items()}
    signals = dict.fromkeys(errors, 0.0)
    handles = []

    def watch(unit: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            expected = list(output_tensors(output).values())
            signals[unit] += sum(float(t.float().square().sum()) for t in expected if t.is_floating_point())
            for key, candidate in bench.candidates[unit].items():
                if key == FLOAT:
                    continue
                found = list(output_tensors(candidate.modules[name](*args, **kwargs)).values())
                errors[unit][key] += sum(
                    float((a.float() - b.float()).square().sum())
                    for a, b in zip(expected, found, strict=True)
                    if a.is_floating_point()
                )

        return hook

    try:
        for unit in bench.units:
            for name in unit.modules:
                module = bench.model.get_submodule(name)
                handles.append(module.register_forward_hook(watch(unit.name, name), with_kwargs=True))
        with evaluating(bench.model):
            for batch in track(batches, "estimating", total=len(batches), enabled=progress):
                run(bench.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        unit: {key: error / signals[unit] if signals[unit] > 0 else 0.0 for key, error in row.items()}
        for unit, row in errors.items()
    }
