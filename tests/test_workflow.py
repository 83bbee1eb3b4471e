"""quantize_ and its steps: what comes out, and that a call that fails leaves the model as it was."""

import copy
import gc
import pickle
import signal
import warnings
import weakref

import pytest
import torch
from test_plan import TiedModel, mlp
from torch import nn

import halfbyte as hb
from halfbyte.staging import Staging

SCHEMES = [
    hb.int8_dynamic(),
    hb.int8_weight_only(),
    hb.int4_weight_only(32),
    hb.int4_weight_only(32, symmetric=True),
    hb.int4_int8_dynamic(32),
    *(hb.int_weight_only(bits) for bits in range(1, 9)),
    hb.int_weight_only(3, 32),
    hb.ternary_weight_only(),
    hb.bf16(),
    hb.fp16(),
]


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, torch.Tensor], int]:
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    modules = [(name, type(m)) for name, m in model.named_modules()]
    return modules, {name: t.clone() for name, t in model.state_dict().items()}, hooks


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    modules, tensors, hooks = snapshot(model)
    assert modules == before[0]
    assert hooks == before[2]
    assert tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, before[1][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (scheme, dtype)
        for scheme in SCHEMES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if dtype == torch.float32 or isinstance(scheme.weight, hb.IntFormat)
    ],
    ids=str,
)
def test_converted_model_computes_with_the_dequantized_weights(scheme: hb.Scheme, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp().to(dtype)
    reference = copy.deepcopy(model)
    report = hb.quantize_(model, scheme, progress=False)
    for quantized, original in zip(model, reference, strict=True):
        if isinstance(original, nn.Linear):
            original.weight.data.copy_(quantized.weight.to(dtype))
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        y, expected = model(x), reference(x)
    assert y.dtype == dtype
    # int8 activations add their own rounding, half a step of 1/127 of each row's largest input
    tolerance = 3e-2 if scheme.activation is not None or dtype != torch.float32 or scheme == hb.bf16() else 2e-3
    assert ((y - expected).float().norm() / expected.float().norm()).item() < tolerance
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize(
    ("bits", "bound"), [(8, 0.01), (7, 0.02), (6, 0.04), (5, 0.08), (4, 0.15), (3, 0.3), (2, 0.5), (1, 0.7)]
)
def test_error_shrinks_with_bits_and_is_what_the_weights_say(bits: int, bound: float) -> None:
    torch.manual_seed(0)
    model = mlp()
    weight = model[0].weight.detach().clone()
    report = hb.quantize_(model, hb.int_weight_only(bits), progress=False)
    module = next(m for m in report.modules if m.name == "0")
    measured = ((model[0].dequantize() - weight).norm() / weight.norm()).item()
    assert module.relative_error == pytest.approx(measured, rel=1e-4)
    assert measured < bound


def test_mse_is_no_worse_than_minmax_and_data_weighting_helps_the_output() -> None:
    torch.manual_seed(0)
    scale = torch.linspace(0.05, 4, 64)
    batches = [torch.randn(64, 64) * scale for _ in range(4)]
    model = nn.Sequential(nn.Linear(64, 256))
    nn.init.normal_(model[0].weight)
    outputs, errors = {}, {}
    for name, algorithms, data in (
        ("minmax", [hb.RTN()], None),
        ("mse", [hb.MSE()], None),
        ("weighted", [hb.MSE()], batches),
    ):
        quantized = copy.deepcopy(model)
        report = hb.quantize_(quantized, hb.int_weight_only(3, 32), data, algorithms, progress=False)
        errors[name] = report.modules[0].relative_error
        with torch.no_grad():
            outputs[name] = (quantized(batches[0]) - model(batches[0])).norm().item()
    assert errors["mse"] < errors["minmax"]
    assert outputs["weighted"] < outputs["mse"]


def test_steps_give_what_one_call_gives() -> None:
    torch.manual_seed(0)
    model, batches = mlp(), [torch.randn(8, 64) for _ in range(3)]
    at_once, in_steps = copy.deepcopy(model), copy.deepcopy(model)
    hb.quantize_(at_once, hb.int_weight_only(3, 32), batches, progress=False)
    assert hb.prepare_(in_steps, hb.int_weight_only(3, 32)) is in_steps
    with torch.no_grad():
        torch.testing.assert_close(in_steps(batches[0]), model(batches[0]), rtol=0, atol=0)
    hb.convert_(
        hb.calibrate(copy.deepcopy(in_steps), batches, progress=False), progress=False
    )  # a copy does not disturb it
    in_steps = pickle.loads(pickle.dumps(in_steps))
    for part in (batches[:2], batches[2:]):
        hb.calibrate(in_steps, part, progress=False)
    # prepare_, copied and pickled, also saw batches[0] once outside calibrate: more of the same data
    report = hb.convert_(in_steps, progress=False)
    assert report.calibration_batches == 3
    assert snapshot(in_steps)[2] == 0
    assert type(in_steps[0]) is type(at_once[0])
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert ((in_steps(x) - at_once(x)).norm() / at_once(x).norm()).item() < 0.2


def test_same_input_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = TiedModel()
    states = []
    for threads in (1, 2, 4):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        quantized = copy.deepcopy(model)
        hb.quantize_(quantized, hb.int4_weight_only(32), progress=False)
        torch.set_num_threads(before)
        states.append(quantized.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_tied_weights_stay_one_tensor() -> None:
    model = TiedModel()
    report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert model.embed.qweight is model.head.qweight
    assert model.embed.scale is model.head.scale
    copied = copy.deepcopy(model)
    assert copied.embed.qweight is copied.head.qweight
    assert report.bytes_after < report.bytes_before / 2.5
    tokens = torch.randint(0, 100, (3, 5))
    torch.testing.assert_close(model.embed(tokens), model.head.dequantize()[tokens], rtol=0, atol=0)


def test_tied_half_precision_weights_stay_one_parameter() -> None:
    model = TiedModel()
    hb.quantize_(model, hb.bf16(), progress=False)
    assert model.embed.weight is model.head.weight
    assert model(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32


def test_module_used_in_two_places_is_one_module_after() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert model["a"] is model["b"][1]
    assert isinstance(model["a"], hb.nn.QuantizedLinear)
    assert len(report.modules) == 1


def test_casting_the_model_keeps_the_scales() -> None:
    model = TiedModel()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    scale = model.body.scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.body.scale, scale)
    assert model.embed.qweight is model.head.qweight
    assert model(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16
    assert model.body.weight.dtype == torch.bfloat16


def test_hooks_of_the_user_survive() -> None:
    model, seen = mlp(), []
    handle = model[0].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    model(torch.randn(1, 64))
    assert seen == [hb.nn.QuantizedLinear]
    handle.remove()
    model(torch.randn(1, 64))
    assert len(seen) == 1


def test_encoder_layer_is_kept_off_its_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        calls = []
        report = hb.quantize_(model, hb.int8_dynamic(), progress=False)
        for module in model.modules():
            if isinstance(module, hb.nn.QuantizedLinear):
                module.register_forward_hook(lambda m, i, o: calls.append(m))
        y = model(x, src_key_padding_mask=padding)
    assert len(calls) == 12  # two layers: four projections of the attention, two of the feed-forward block
    kept = ~padding
    assert ((y - expected)[kept].norm() / expected[kept].norm()).item() < 0.05
    attention = [m for m in report.modules if "self_attn" in m.name]
    assert len(attention) == 8 and all(m.plan.scheme == hb.int8_dynamic() for m in attention)


def test_multihead_attention_that_is_left_out_still_computes_what_it_did() -> None:
    torch.manual_seed(0)
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"attention": None})
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, batch_first=True), "fc": nn.Linear(32, 32)}).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model["attention"](x, x, x)[0]
        hb.quantize_(model, recipe, progress=False)
        torch.testing.assert_close(model["attention"](x, x, x)[0], expected, rtol=0, atol=0)


# --- a failed call leaves the model as it was -------------------------------------------------------------------------


def with_weight(value: float) -> nn.Sequential:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    return model


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "inf")])
@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_weight_only(32), hb.bf16()], ids=str)
def test_weight_that_is_not_finite_is_named(scheme: hb.Scheme, value: float, word: str) -> None:
    model = with_weight(value)
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=f"2: weight has {word}"):
        hb.quantize_(model, scheme, progress=False)
    assert_unchanged(model, before)


def test_model_in_the_asked_float_type_has_nothing_to_quantize() -> None:
    with pytest.raises(hb.QuantizationError, match="is bfloat16 already"):
        hb.quantize_(mlp().bfloat16(), hb.bf16(), progress=False)


def test_integer_weight_is_named() -> None:
    model = mlp()
    model[2].weight = nn.Parameter(torch.ones(10, 128, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=r"2: weight has dtype torch.int8"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert_unchanged(model, before)


def test_meta_model_is_refused() -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(hb.QuantizationError, match="0: weight is on device meta"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False)


def test_quantized_model_is_refused() -> None:
    model = mlp()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match="0 is quantized already"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert_unchanged(model, before)


def test_fallback_raises_before_any_work_or_warns() -> None:
    model = nn.Sequential(nn.Linear(48, 8))
    before = snapshot(model)
    with pytest.raises(hb.FallbackError, match="0: group_size=32 does not divide in_features=48"):
        hb.quantize_(model, hb.int4_weight_only(32), progress=False, on_fallback="raise")
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="on_fallback='ignore'"):
        hb.quantize_(model, hb.int4_weight_only(32), progress=False, on_fallback="ignore")  # type: ignore[arg-type]
    assert_unchanged(model, before)
    with pytest.warns(hb.FallbackWarning, match="group_size=24 is used"):
        report = hb.quantize_(copy.deepcopy(model), hb.int4_weight_only(32), progress=False)
    assert [f.kind for f in report.fallbacks] == ["group_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hb.quantize_(model, hb.int4_weight_only(32), progress=False, on_fallback="allow")


def test_scales_that_do_not_fit_float16_fall_back_to_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    weight = model[0].weight.detach().clone()
    report = hb.quantize_(model, hb.int4_weight_only(32), progress=False, on_fallback="allow")
    assert [f.kind for f in report.fallbacks] == ["scale_dtype"]
    assert model[0].scale.dtype == torch.float32
    assert ((model[0].dequantize() - weight).norm() / weight.norm()).item() < 0.15
    assert report.bytes_after == sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], hb.QuantizationError, "no batches"),
        (iter([]), hb.QuantizationError, "gave no batches"),
        (torch.randn(4, 64), TypeError, "one tensor"),
        ({"x": torch.randn(4, 64)}, TypeError, "one mapping"),
        ("text", TypeError, "a str"),
        (3, TypeError, "a int"),
        ([3], TypeError, "a batch is a int"),
        ([torch.randn(4, 63)], RuntimeError, "shape"),
        ([torch.full((4, 64), float("nan"))], hb.QuantizationError, "0: NaN or inf among its inputs"),
    ],
)
def test_bad_data_leaves_the_model_as_it_was(data: object, error: type, message: str) -> None:
    model = mlp()
    model.train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        hb.quantize_(model, hb.int4_weight_only(32), data, progress=False)  # type: ignore[arg-type]
    assert_unchanged(model, before)
    assert all(m.training for m in model.modules())


def test_exhausted_generator_is_refused() -> None:
    batches = (torch.randn(4, 64) for _ in range(2))
    hb.quantize_(mlp(), hb.int4_weight_only(32), batches, progress=False)
    with pytest.raises(hb.QuantizationError, match="used up before"):
        hb.quantize_(mlp(), hb.int4_weight_only(32), batches, progress=False)


def test_data_is_demanded_where_needed() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match="MSE needs calibration data"):
        hb.quantize_(model, hb.int4_weight_only(32), algorithms=[hb.MSE(weighting="data")], progress=False)
    assert_unchanged(model, before)


def test_module_that_never_ran_is_named() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Skips()
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match="unused never ran on the data"):
        hb.quantize_(model, hb.int4_weight_only(32), [torch.randn(4, 64)], progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("algorithms", "error", "message"),
    [
        (hb.MSE(), TypeError, "not a list"),
        ([hb.MSE], TypeError, "use an instance"),
        (["mse"], TypeError, "not an algorithm"),
        ([hb.MSE(), hb.RTN()], ValueError, "only one"),
    ],
)
def test_bad_algorithms_are_refused(algorithms: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        hb.quantize_(mlp(), hb.int4_weight_only(32), algorithms=algorithms, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [0, 2])
def test_interrupt_while_rounding_leaves_the_model_as_it_was(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = snapshot(model)

    class Interrupted(hb.RTN):
        def round(self, weight, weight_format, importance):  # type: ignore[no-untyped-def]
            if weight.data_ptr() == model[layer].weight.data_ptr():
                raise KeyboardInterrupt
            return super().round(weight, weight_format, importance)

    with pytest.raises(KeyboardInterrupt):
        hb.quantize_(model, hb.int8_dynamic(), algorithms=[Interrupted()], progress=False)
    assert_unchanged(model, before)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)


def test_interrupt_while_swapping_is_raised_after_the_last_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, get = mlp(), Staging.get

    def interrupted(self: Staging, key: str) -> object:
        signal.raise_signal(signal.SIGINT)
        return get(self, key)

    monkeypatch.setattr(Staging, "get", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a session in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            hb.quantize_(model, hb.int8_dynamic(), progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(model[0], hb.nn.QuantizedLinear)
    assert isinstance(model[2], hb.nn.QuantizedLinear)


def test_full_disk_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def seek(self, offset: int) -> int:
            return offset

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr("halfbyte.staging.tempfile.TemporaryFile", lambda **_: FullDisk())
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    before = snapshot(model)
    with pytest.raises(OSError, match="No space left"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert_unchanged(model, before)


def test_spilled_weights_come_back_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    spilled, held = copy.deepcopy(model), copy.deepcopy(model)
    hb.quantize_(spilled, hb.int4_weight_only(32), progress=False)  # default budget: a quarter of one layer
    hb.quantize_(held, hb.int4_weight_only(32), progress=False, max_memory="1GB")
    for name, tensor in held.state_dict().items():
        assert torch.equal(spilled.state_dict()[name], tensor)


def test_memory_limit_below_the_need_is_refused_with_the_need() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(hb.QuantizationError, match=r"max_memory='10kB' is too little.*need"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False, max_memory="10kB")
    with pytest.raises(ValueError, match="not a size"):
        hb.quantize_(model, hb.int8_dynamic(), progress=False, max_memory="much")
    assert_unchanged(model, before)


def test_float_weights_are_gone_afterwards() -> None:
    model = mlp()
    weights = [weakref.ref(m.weight) for m in model if isinstance(m, nn.Linear)]
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_steps_out_of_order_are_refused() -> None:
    model = mlp()
    for step in (lambda: hb.convert_(model), lambda: hb.calibrate(model, [torch.randn(1, 64)])):
        with pytest.raises(hb.QuantizationError, match="not prepared"):
            step()
    hb.prepare_(model, hb.int4_weight_only(32), [hb.MSE(weighting="data")])
    with pytest.raises(hb.QuantizationError, match="prepared already"):
        hb.prepare_(model, hb.int8_dynamic())
    with pytest.raises(hb.QuantizationError, match=r"run hb.calibrate\(model, data\) first"):
        hb.convert_(model, progress=False)
    hb.calibrate(model, [torch.randn(4, 64)], progress=False)
    hb.convert_(model, progress=False)


def test_batches_of_every_kind_run() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.fc(x if y is None else x + y)

    x = torch.randn(4, 64)
    data = [x, (x, x), [x, x], {"x": x, "y": x}]
    report = hb.quantize_(Two(), hb.int4_weight_only(32), data, progress=False)
    assert report.calibration_batches == 4
    report = hb.quantize_(
        Two(), hb.int4_weight_only(32), ["a", "b"], progress=False, forward=lambda model, batch: model(x)
    )
    assert report.calibration_batches == 2


def test_report_reads_well() -> None:
    report = hb.quantize_(TiedModel(), hb.int4_weight_only(32), progress=False)
    text = str(report)
    for word in ("body", "int4 group 32 asymmetric", "MSE", "tied to head", "total", "x smaller"):
        assert word in text
    fields = report.to_dict()
    assert fields["bytes_after"] == report.bytes_after
    body = next(m for m in report.modules if m.name == "body")
    assert body.sqnr_db == pytest.approx(-20 * torch.log10(torch.tensor(body.relative_error)).item(), rel=1e-4)
    assert "<table>" in report._repr_html_()
    import json

    json.dumps(fields)
