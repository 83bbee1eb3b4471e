"""`hb.quantize_(..., algorithms=[hb.GPTQ()])`: better outputs, layers in order, and models that failed calls leave alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from block_models import Model, data, make
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.flow import find_blocks
from halfbyte.hessian import InputHessian, retarget, reversed_cholesky
from halfbyte.sequential import round_in_order

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantize(model: nn.Module, algorithm: object, scheme: hb.Scheme | None = None, **options: object) -> hb.Report:
    scheme = scheme or hb.int_weight_only(3, group_size=16)
    return hb.quantize_(
        model,
        scheme,
        data=data(1),
        algorithms=[algorithm],
        progress=False,
        on_fallback="allow",
        **options,  # type: ignore[list-item, arg-type]
    )


def error(quantized: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        return sum((quantized(b) - original(b)).square().sum().item() for b in data(2))


@pytest.mark.parametrize("chained", [True, False])
def test_gptq_loses_less_than_mse_on_other_data(chained: bool) -> None:
    original = make(chained=chained)
    errors = []
    for algorithm in (hb.MSE(), hb.GPTQ()):
        model = copy.deepcopy(original)
        report = quantize(model, algorithm)
        errors.append(error(model, original))
    rounding = {m.name: m.rounding for m in report.modules if m.plan.scheme is not None}
    assert rounding == {"embed": "GPTQ"} | {n: "GPTQ" for n in rounding if n != "embed"}
    assert errors[1] < 0.8 * errors[0]
    assert report.calibration_batches == 4


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("options", [{}, {"group_scales": "static"}, {"act_order": False}, {"polish": 0}])
def test_every_width_runs(bits: int, options: dict[str, object]) -> None:
    model = make()
    report = quantize(model, hb.GPTQ(**options), hb.int_weight_only(bits, group_size=16))  # type: ignore[arg-type]
    assert not report.fallbacks
    assert torch.isfinite(model(data(2)[0])).all()


def test_codebooks_are_rounded_to_and_beat_nearest_values() -> None:
    original, scheme, errors = make(), hb.codebook_weight_only((-1, -0.5, -0.2, 0, 0.2, 0.5, 1), 16), []
    for algorithm in (hb.RTN(), hb.MSE(), hb.GPTQ(), hb.GPTQ(group_scales="static")):
        model = copy.deepcopy(original)
        report = quantize(model, algorithm, scheme)
        errors.append(error(model, original))
    assert not report.fallbacks
    assert max(errors[2:]) < 0.8 * min(errors[:2])
    assert hb.verify(model, data(2)).ok


def test_layers_see_what_quantized_layers_before_them_produce() -> None:
    model, seen = make(), []

    def round_layer(name: str, layer: nn.Linear, inputs: InputHessian) -> Tensor:
        seen.append((name, inputs.matrix()))
        return torch.zeros_like(layer.weight)

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    before = copy.deepcopy(model.state_dict())
    round_in_order(model, names, data(1), round_layer, progress=False)
    assert [name for name, _ in seen] == [f"layers.{i}.{n}" for i in range(3) for n in ("gate", "up", "down")] + [
        "head"
    ]
    hessians = dict(seen)
    assert torch.equal(hessians["layers.0.gate"], hessians["layers.0.up"])
    # gate and up are zero by then, so down gets sigmoid(bias) * bias, whatever the token.
    with torch.no_grad():
        layer = model.layers[0]
        constant = torch.sigmoid(layer.gate.bias) * layer.up.bias  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(hessians["layers.0.down"].float(), constant[:, None] * constant, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_drift_is_what_quantized_layers_before_changed() -> None:
    model, seen = make(), {}

    def round_layer(name: str, layer: nn.Linear, inputs: InputHessian) -> Tensor:
        seen[name] = inputs.drift()
        return layer.weight * (0.5 if name.endswith("up") else 1.0)  # halves what down gets

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        model.layers[0].up.bias.zero_()  # type: ignore[union-attr, operator]
    round_in_order(model, names, data(1), round_layer, drift=True, progress=False)
    assert not seen["layers.0.gate"].any()  # type: ignore[union-attr]
    rows: list[Tensor] = []
    hook = model.layers[0].down.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, -2)))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for batch in data(1):
            model(batch)
    hook.remove()
    y = torch.cat(rows).double()
    torch.testing.assert_close(seen["layers.0.down"], (y - y / 2).T @ (y / 2) / len(y), rtol=1e-4, atol=1e-7)
    assert seen["layers.2.gate"].abs().max() > 0 and seen["head"].abs().max() > 0  # type: ignore[union-attr]


def test_routed_tokens_have_no_drift() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.expert(x[x[:, 0] > 0.1])

    torch.manual_seed(0)
    model, seen = nn.Sequential(Routed()), {}

    def round_layer(name: str, layer: nn.Linear, inputs: InputHessian) -> Tensor:
        seen[name] = inputs.drift()
        return layer.weight * 0.3

    round_in_order(model, ["0.first", "0.expert"], [torch.randn(50, 8)], round_layer, drift=True, progress=False)
    assert seen["0.first"] is not None and seen["0.expert"] is None


def test_retarget_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 20, dtype=torch.float64, generator=generator)
    y = x + 0.3 * torch.randn(400, 20, dtype=torch.float64, generator=generator)
    weight, order = torch.randn(6, 20, generator=generator), torch.randperm(20, generator=generator)
    h, drift = x.T @ x / 400, (y - x).T @ x / 400
    factor, _ = reversed_cholesky(h, 0.0, order)
    solution = torch.linalg.lstsq(x, y @ weight.double().T).solution.T
    torch.testing.assert_close(retarget(weight, factor, order, drift, 1.0).double(), solution, rtol=1e-4, atol=1e-5)
    half = (solution + weight.double()) / 2
    torch.testing.assert_close(retarget(weight, factor, order, drift, 0.5).double(), half, rtol=1e-4, atol=1e-5)


def test_feedback_and_polish_lose_less_than_textbook_gptq_on_other_data() -> None:
    errors = {}
    for name, options in {
        "textbook": {"error_feedback": 0.0, "polish": 0},
        "polish": {"error_feedback": 0.0},
        "both": {},
    }.items():
        total = 0.0
        for seed in range(3):
            original = make(seed)
            model = copy.deepcopy(original)
            scheme = hb.int_weight_only(2, group_size=16)
            hb.quantize_(
                model, scheme, data=data(1, 20), algorithms=[hb.GPTQ(**options)], progress=False, on_fallback="allow"
            )  # type: ignore[arg-type]
            total += error(model, original)
        errors[name] = total
    assert errors["both"] < errors["polish"] < errors["textbook"]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(self.embed(tokens))


@pytest.mark.parametrize("algorithm", [hb.GPTQ(), hb.MSE()])
@pytest.mark.parametrize("in_steps", [False, True])
def test_padding_does_not_count(algorithm: object, in_steps: bool) -> None:
    tokens = torch.randint(1, 50, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 12, 1, 9])[:, None]
    states = []
    for pad in (0, 49):
        torch.manual_seed(0)
        model = Masked()
        with torch.no_grad():
            model.embed.weight[0] = float("nan")
            model.embed.weight[49] = 100.0
            tokens = torch.where(mask & (tokens != 49), tokens, torch.where(mask, 1, pad))
        scheme = hb.Recipe(default=hb.int_weight_only(3, group_size=16), overrides={"embed": None})
        batches = [{"tokens": tokens, "attention_mask": mask.long()}]
        if in_steps:
            hb.prepare_(model, scheme, algorithms=[algorithm])  # type: ignore[list-item]
            hb.calibrate(model, batches, progress=False)
            hb.convert_(model, progress=False)
        else:
            hb.quantize_(model, scheme, data=batches, algorithms=[algorithm], progress=False)  # type: ignore[list-item]
        states.append({key: value for key, value in model.state_dict().items() if key.startswith("linear")})
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_blocks_are_the_list_that_holds_most_layers() -> None:
    model = make()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert find_blocks(model, names) == ["layers.0", "layers.1", "layers.2"]
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"]) == []


def test_one_call_and_steps_agree_on_the_first_layer_and_both_run() -> None:
    first, second = make(), make()
    quantize(first, hb.GPTQ())
    hb.prepare_(second, hb.int_weight_only(3, group_size=16), algorithms=[hb.GPTQ()], on_fallback="allow")
    hb.calibrate(second, data(1), progress=False)
    report = hb.convert_(second, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(first.layers[0].gate.buffers(), second.layers[0].gate.buffers(), strict=True)
    )  # type: ignore[union-attr]
    assert {m.rounding for m in report.modules if m.plan.scheme is not None} == {"GPTQ"}


def test_same_bytes_for_every_number_of_threads() -> None:
    states = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        model = nn.Sequential(nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 8))
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        batches = [torch.randn(300, 96, generator=torch.Generator().manual_seed(7))]
        hb.quantize_(model[:1], hb.int4_weight_only(32), data=batches, algorithms=[hb.GPTQ()], progress=False)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_dead_and_never_seen_columns_are_harmless() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16))
    x = torch.randn(200, 64)
    x[:, [3, 17]] = 0
    x[:, 32:48] = 0  # a whole group
    weight = model[0].weight.detach().clone()
    hb.quantize_(model, hb.int_weight_only(8, group_size=16), data=[x], algorithms=[hb.GPTQ()], progress=False)
    rounded = model[0].packed_weight.dequantize(model[0].scheme.weight)
    assert (rounded - weight).abs().max() < 0.01


def snapshot(model: nn.Module) -> tuple[list[type], dict[str, Tensor], list[int], bool]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [type(m) for m in model.modules()], copy.deepcopy(model.state_dict()), hooks, model.training


def assert_untouched(model: nn.Module, before: tuple[list[type], dict[str, Tensor], list[int], bool]) -> None:
    after = snapshot(model)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert after[1].keys() == before[1].keys() and all(torch.equal(after[1][k], v) for k, v in before[1].items())


def test_too_few_tokens_says_how_many_more() -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(
        hb.QuantizationError, match=r"layers\.0\.down: 40 tokens .* its 64 inputs; give at least 24 more"
    ):
        hb.quantize_(
            model,
            hb.int4_weight_only(16),
            data=[torch.randint(0, 50, (4, 10))],
            algorithms=[hb.GPTQ()],
            progress=False,
        )
    assert_untouched(model, before)


def test_nan_inputs_are_named() -> None:
    model = make()
    with torch.no_grad():
        model.layers[1].norm.bias[0] = float("nan")  # type: ignore[union-attr, index, operator]
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(hb.QuantizationError, match=r"layers\.1\.(gate|up): NaN or inf among its inputs"):
        quantize(model, hb.GPTQ())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_a_layer_that_never_runs_is_named() -> None:
    model = make()
    model.layers[1].extra = nn.Linear(32, 32)  # type: ignore[union-attr]
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=r"layers\.1\.extra never ran"):
        quantize(model, hb.GPTQ())
    assert_untouched(model, before)


def test_a_block_that_never_runs_is_named() -> None:
    class Skipping(Model):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for layer in self.layers[:2]:  # type: ignore[index]
                x = layer(x, torch.tensor(0.5))[0]
            return self.head(x)

    torch.manual_seed(0)
    model = Skipping()
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=r"layers\.2\.\w+ never ran on the data"):
        quantize(model, hb.GPTQ())
    assert_untouched(model, before)


def test_sequences_of_unequal_length_count_by_token() -> None:
    tokens = torch.randint(0, 50, (12, 30), generator=torch.Generator().manual_seed(0))
    pieces = [tokens, [tokens[:3], tokens[3:, :17], tokens[3:, 17:]]]
    seen: list[list[Tensor]] = [[], []]
    for hessians, batches in zip(seen, ([pieces[0]], pieces[1]), strict=True):

        def round_layer(name: str, layer: nn.Linear, inputs: InputHessian, into: list[Tensor] = hessians) -> Tensor:
            assert inputs.tokens == tokens.numel()
            into.append(inputs.matrix())
            return layer.weight * 0.9

        names = [name for name, module in make().named_modules() if isinstance(module, nn.Linear)]
        round_in_order(make(), names, batches, round_layer, drift=True, progress=False)  # type: ignore[arg-type]
    for together, apart in zip(*seen, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-7)  # float32 sums in another order


def test_interrupt_leaves_the_model_as_it_was() -> None:
    class Interrupted(hb.GPTQ):
        def round_layer(self, name, *arguments):  # type: ignore[no-untyped-def]
            if name == "layers.2.down":
                raise KeyboardInterrupt
            return super().round_layer(name, *arguments)

    model = make().train()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, Interrupted())
    assert_untouched(model, before)


def test_needs_data_and_memory_is_refused_up_front() -> None:
    with pytest.raises(hb.QuantizationError, match="GPTQ needs calibration data"):
        hb.quantize_(make(), hb.int4_weight_only(16), algorithms=[hb.GPTQ()], progress=False)
    with pytest.raises(hb.QuantizationError, match="its calibration need"):
        quantize(make(), hb.GPTQ(), max_memory=80_000)
    with pytest.raises(ValueError, match="group_scales"):
        hb.GPTQ(group_scales="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="damping"):
        hb.GPTQ(damping=-1.0)
    with pytest.raises(ValueError, match="error_feedback"):
        hb.GPTQ(error_feedback=2.0)
    with pytest.raises(ValueError, match="polish"):
        hb.GPTQ(polish=-1)


def test_factor_and_damping() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 50, dtype=torch.float64, generator=generator)
    h, order = x.T @ x / 300, torch.randperm(50, generator=generator)
    factor, damping = reversed_cholesky(h, 0.01, order)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(50)
    assert damping == 0.01
    torch.testing.assert_close((factor.double() @ factor.double().T), damped[order][:, order], rtol=1e-5, atol=1e-6)
    assert torch.equal(factor, factor.triu())
    # Rank one, undamped: damping is raised until it factors.
    ones = torch.ones(50, 50, dtype=torch.float64)
    _, raised = reversed_cholesky(ones, 0.0, torch.arange(50))
    assert 0 < raised < 1e-3
    # Float64 is tried before damping is raised: eigenvalues 1e-9 apart from 1 are lost in float32.
    fine = ones + 1e-9 * torch.eye(50)
    assert reversed_cholesky(fine, 0.0, torch.arange(50))[1] == 0.0
    with pytest.raises(hb.QuantizationError):
        reversed_cholesky(torch.full((4, 4), float("nan"), dtype=torch.float64), 0.01, torch.arange(4))


def test_raised_damping_is_a_fallback() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    x = torch.randn(100, 1) @ torch.ones(1, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = hb.quantize_(
            model, hb.int4_weight_only(16), data=[x], algorithms=[hb.GPTQ(damping=0.0)], progress=False
        )
    assert [f.kind for f in report.fallbacks] == ["damping"]
    strict = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(hb.FallbackError, match="damping"):
        hb.quantize_(
            strict,
            hb.int4_weight_only(16),
            data=[x],
            algorithms=[hb.GPTQ(damping=0.0)],
            progress=False,
            on_fallback="raise",
        )
    assert type(strict[0]) is nn.Linear
