"""Multi-head attention in parts: PyTorch's own module with the same weights is the oracle."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import functional

PADDING = torch.zeros(3, 7, dtype=torch.bool)
PADDING[1, 5:] = True
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PER_HEAD = torch.rand(12, 5, 7) < 0.2


def pair(scheme: hb.Scheme, **settings: object) -> tuple[nn.MultiheadAttention, nn.Module]:
    """The quantized module, and a float one with the very weights that it multiplies with."""
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(32, 4, **settings).eval()
    if reference.in_proj_bias is not None:
        nn.init.normal_(reference.in_proj_bias)
        nn.init.normal_(reference.out_proj.bias)
    model = nn.ModuleDict({"a": copy.deepcopy(reference)})
    hb.quantize_(model, scheme, progress=False)
    quantized = model["a"]
    with torch.no_grad():
        weights = [p.weight for p in (quantized.q_proj, quantized.k_proj, quantized.v_proj)]
        if reference.in_proj_weight is not None:
            reference.in_proj_weight.copy_(torch.cat(weights))
        else:
            for name, weight in zip("qkv", weights, strict=True):
                getattr(reference, f"{name}_proj_weight").copy_(weight)
        reference.out_proj.weight.copy_(quantized.out_proj.weight)
    return reference, quantized


@pytest.mark.parametrize(
    ("settings", "masks"),
    [
        ({"batch_first": True}, {}),
        ({}, {}),
        ({"batch_first": True, "bias": False}, {"key_padding_mask": PADDING}),
        ({"batch_first": True, "kdim": 16, "vdim": 24}, {"key_padding_mask": PADDING}),
        ({"batch_first": True, "add_bias_kv": True}, {"key_padding_mask": PADDING}),
        ({"batch_first": True, "add_zero_attn": True}, {"attn_mask": PER_HEAD}),
        ({"batch_first": True}, {"attn_mask": PER_HEAD, "key_padding_mask": PADDING}),
        ({"batch_first": True}, {"attn_mask": torch.zeros(5, 7), "need_weights": False}),
        ({"batch_first": True}, {"key_padding_mask": PADDING, "need_weights": False}),
        ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"need_weights": False}),
        ({"batch_first": True}, {"average_attn_weights": False}),
    ],
)
@torch.no_grad()
def test_equals_pytorch_with_the_same_weights(settings: dict[str, object], masks: dict[str, object]) -> None:
    reference, quantized = pair(hb.int8_weight_only(), **settings)
    q, k, v = torch.randn(3, 5, 32), torch.randn(3, 7, reference.kdim), torch.randn(3, 7, reference.vdim)
    if not reference.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    expected, expected_weights = reference(q, k, v, **masks)
    output, weights = quantized(q, k, v, **masks)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@torch.no_grad()
def test_causal_hint_and_input_without_a_batch(need_weights: bool) -> None:
    reference, quantized = pair(hb.int8_weight_only())
    x = torch.randn(5, 32)
    expected, _ = reference(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=need_weights)
    output, _ = quantized(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_int8_dynamic(32), hb.bf16()], ids=str)
@torch.no_grad()
def test_transformer_runs_quantized_throughout(scheme: hb.Scheme) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True).eval()
    source, target = torch.randn(2, 6, 32), torch.randn(2, 4, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    arguments = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": CAUSAL[:4, :4]}
    expected = model(source, target, **arguments)
    report = hb.quantize_(model, scheme, progress=False)
    left = {m.name for m in report.modules if m.plan.scheme is None}
    assert all("norm" in name for name in left)
    assert ((model(source, target, **arguments) - expected).norm() / expected.norm()).item() < 0.1


def test_planned_bytes_are_those_of_the_converted_module() -> None:
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(32, 4, add_bias_kv=True), "b": nn.MultiheadAttention(32, 4, kdim=16)}
    )
    before = sum(p.nbytes for p in model.parameters())
    plan = hb.plan(model, hb.int4_weight_only(16))
    report = hb.quantize_(model, plan, progress=False)
    after = sum(t.nbytes for t in model.state_dict().values())
    assert (plan.bytes_before, plan.bytes_after) == (before, after) == (report.bytes_before, report.bytes_after)


def test_one_projection_can_be_left_in_float() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(32, 4)})
    hb.quantize_(model, hb.Recipe(default=hb.int8_dynamic(), overrides={"a.out_proj": None}), progress=False)
    assert isinstance(model["a"].q_proj, hb.nn.QuantizedLinear)
    assert type(model["a"].out_proj) is nn.Linear


@torch.no_grad()
def test_failed_call_on_an_encoder_leaves_its_fused_path() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    flags = [(m.activation_relu_or_gelu, m.self_attn) for m in model.layers], model.use_nested_tensor

    def fail(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        hb.quantize_(model, hb.int8_dynamic(), [torch.randn(2, 3, 32)], progress=False, forward=fail)
    assert ([(m.activation_relu_or_gelu, m.self_attn) for m in model.layers], model.use_nested_tensor) == flags


@torch.no_grad()
def test_export_and_compile() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    x = torch.randn(2, 6, 32)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"src": {1: length}})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def heads(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def per_head_linear(x: Tensor, codes: Tensor, scale: Tensor, **more: bool) -> Tensor:
    """One head: rows `x` times a weight of int8 `codes` `[O, I]` with a scale for each output."""
    packed = hb.ops.pack(codes.to(torch.int8).contiguous(), 8, layout="tiles")
    return hb.ops.linear_int8(x, packed, scale.reshape(1, -1), None, None, bits=8, out_features=len(codes), **more)


@pytest.mark.parametrize(("length", "source", "width"), [(1, 1, 1), (5, 7, 16), (3, 33, 20), (40, 17, 64)])
def test_int8_products_equal_linear_layers_with_the_codes_as_weights(
    length: int, source: int, width: int, restore_level: None, restore_threads: None
) -> None:
    query, key = heads(2, 3, length, width), heads(2, 3, source, width).flip(0)
    weights = torch.softmax(heads(2, 3, length, source), dim=-1)
    scores, values = hb.ops.attention_scores_int8(query, key), hb.ops.attention_values_int8(weights, key)
    codes, scale = functional.quantize_rows_dynamic(key)
    for b, h in ((0, 0), (1, 2)):
        expected = per_head_linear(query[b, h], codes[b, h], scale[b, h])
        assert torch.equal(scores[b, h], expected)
        x = weights[b, h] * scale[b, h].t()
        assert torch.equal(values[b, h], per_head_linear(x, codes[b, h].t(), torch.ones(width), asymmetric=True))
    for level in hb.available_capabilities():
        hb._extension.set_cpu_capability(level)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(hb.ops.attention_scores_int8(query, key), scores)
            assert torch.equal(hb.ops.attention_values_int8(weights, key), values)
    exact = query @ key.transpose(-2, -1)
    assert ((scores - exact).norm() / exact.norm()).item() < 0.03
    exact = weights @ key
    assert ((values - exact).norm() / exact.norm()).item() < 0.03


def test_int8_values_without_tokens_are_zero_as_in_pytorch() -> None:
    assert torch.equal(
        hb.ops.attention_values_int8(torch.zeros(2, 3, 5, 0), torch.zeros(2, 3, 0, 8)), torch.zeros(2, 3, 5, 8)
    )


def test_opcheck_of_int8_products() -> None:
    for op, a, b in (("scores", (2, 3, 8), (2, 5, 8)), ("values", (2, 3, 5), (2, 5, 8))):
        torch.library.opcheck(getattr(torch.ops.halfbyte, f"attention_{op}_int8").default, (heads(*a), heads(*b)))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (heads(2, 3, 8), heads(2, 5, 7), ValueError, r"query has shape \(2, 3, 8\) and key \(2, 5, 7\)"),
        (heads(2, 3, 8), heads(3, 5, 8), ValueError, "do not fit"),
        (heads(3, 8), heads(5, 8), ValueError, "do not fit"),
        (heads(2, 3, 8), heads(2, 5, 8).half(), TypeError, "key has dtype torch.float16"),
    ],
)
def test_int8_products_refuse_what_does_not_fit(a: Tensor, b: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hb.ops.attention_scores_int8(a, b)


INT8_ATTENTION = hb.int8_attention(hb.int8_dynamic())


@pytest.mark.parametrize(
    ("settings", "masks"),
    [
        ({"batch_first": True}, {}),
        ({}, {"need_weights": False}),
        ({"batch_first": True}, {"attn_mask": PER_HEAD, "key_padding_mask": PADDING}),
        ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, {"average_attn_weights": False}),
    ],
)
@torch.no_grad()
def test_int8_attention_is_near_pytorch(settings: dict[str, object], masks: dict[str, object]) -> None:
    reference, quantized = pair(hb.int8_attention(hb.int8_weight_only()), **settings)
    assert quantized.int8_products
    q, k, v = torch.randn(3, 5, 32), torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    if not reference.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    expected, expected_weights = reference(q, k, v, **masks)
    output, weights = quantized(q, k, v, **masks)
    assert 0 < ((output - expected).norm() / expected.norm()).item() < 0.03
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=0.05, atol=0.01)


@torch.no_grad()
def test_int8_attention_is_planned_saved_copied_exported_and_compiled(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        return nn.Sequential(layers, nn.Linear(32, 8)).eval()

    model, x = build(), torch.randn(2, 6, 32)
    expected = model(x)
    plan = hb.plan(model, INT8_ATTENTION)
    assert [row.name for row in plan.rows if row.scheme is not None and row.scheme.attention] == [
        f"0.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    report = hb.quantize_(model, plan, progress=False)
    assert "int8 scores and values" in str(report)
    output = model(x)
    assert ((output - expected).norm() / expected.norm()).item() < 0.05
    hb.save(model, tmp_path / "m.safetensors")
    loaded = hb.load_(build(), tmp_path / "m.safetensors").eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), output)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"input": {1: length}})
    longer = torch.randn(2, 9, 32)
    torch.testing.assert_close(program.module()(longer), model(longer))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(longer), model(longer))


def test_int8_attention_of_a_model_without_such_modules_is_refused() -> None:
    with pytest.raises(hb.QuantizationError, match=r"names no nn\.MultiheadAttention"):
        hb.plan(nn.Sequential(nn.Linear(32, 32)), INT8_ATTENTION)


def test_int8_attention_has_no_gradient() -> None:
    _, quantized = pair(INT8_ATTENTION, batch_first=True)
    x = torch.randn(2, 3, 32, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        quantized(x, x, x)[0].sum().backward()


Q, K = torch.zeros(3, 5, 32), torch.zeros(3, 7, 32)


@pytest.mark.parametrize(
    ("inputs", "arguments", "error", "message"),
    [
        ((Q, K, torch.zeros(3, 6, 32)), {}, ValueError, "their lengths and batches differ"),
        ((Q, torch.zeros(7, 32), K), {}, ValueError, "dimensions"),
        ((Q, torch.zeros(3, 7, 31), K), {}, ValueError, "key has 31 features in its last dimension; 32"),
        ((Q[:2], K, K), {}, ValueError, "batch of 2 and key of 3"),
        ((Q, K, K), {"attn_mask": torch.zeros(7, 5)}, ValueError, r"attn_mask has shape \(7, 5\); use \(5, 7\)"),
        ((Q, K, K), {"attn_mask": torch.zeros(3, 5, 7)}, ValueError, r"use \(5, 7\) or \(12, 5, 7\)"),
        ((Q, K, K), {"key_padding_mask": torch.zeros(3, 5)}, ValueError, r"key_padding_mask .* use \(3, 7\)"),
        ((Q, K, K), {"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "torch.bool or floating point"),
        ((Q, K, K), {"is_causal": True}, ValueError, "give the mask as well"),
        ((Q, None, K), {}, TypeError, "key is a NoneType; give a tensor"),
        ((Q, K, K.bfloat16()), {}, TypeError, "value has dtype torch.bfloat16, query torch.float32"),
        ((Q, K, K), {"attn_mask": torch.zeros(5, 7, device="meta")}, ValueError, "attn_mask is on the device meta"),
    ],
)
def test_bad_input_is_refused(
    inputs: tuple[Tensor, ...], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    _, quantized = pair(hb.int8_dynamic(), batch_first=True)
    with pytest.raises(error, match=message):
        quantized(*inputs, **arguments)
