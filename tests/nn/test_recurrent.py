"""LSTM, GRU, RNN and their cells: the integers of a step-by-step reference, PyTorch's handling of states, and bad input."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import halfbyte as hb
from halfbyte import functional

SCHEMES = [
    hb.int8_dynamic(),
    hb.int8_weight_only(),
    hb.int4_weight_only(16),
    hb.int4_int8_dynamic(16),
    hb.int_weight_only(3, 16),
    hb.int_weight_only(1),
    hb.int8_dynamic(symmetric=False),
    hb.int4_int8_dynamic(16, symmetric_activations=False),
]
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}


def float_rnn(cell: str, inputs: int = 24, hidden: int = 32, **settings: object) -> nn.RNNBase:
    torch.manual_seed(0)
    if cell == "rnn_relu":
        settings["nonlinearity"] = "relu"
    return KINDS[cell](inputs, hidden, **settings).eval()


def quantized(module: nn.Module, scheme: hb.Scheme) -> nn.Module:
    model = nn.ModuleDict({"m": copy.deepcopy(module)})
    hb.quantize_(model, scheme, progress=False, on_fallback="allow")
    return model["m"]


def states_of(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def step_by_step(
    rnn: nn.Module, x: Tensor, states: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`[T, B, I]` through a quantized layer, one token at a time, each with operators of its own."""
    directions = 2 if rnn.bidirectional else 1
    if states is None:
        states = tuple(torch.zeros(rnn.num_layers * directions, x.shape[1], rnn.hidden_size) for _ in range(2))
    last: list[tuple[Tensor, ...]] = []
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            ih, hh = rnn.get_submodule(f"ih_{suffix}"), rnn.get_submodule(f"hh_{suffix}")
            h, c = (s[layer * directions + direction] for s in (states[0], states[-1]))
            steps = []
            for token in x.flip(0) if direction else x:
                h, c = functional.recurrent_step(rnn.cell, ih(token), hh(h), h, c)
                steps.append(h)
            outputs.append(torch.stack(steps).flip(0) if direction else torch.stack(steps))
            last.append((h,) if c is None else (h, c))
        x = torch.cat(outputs, dim=-1)
    return x, tuple(torch.stack(each) for each in zip(*last, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one layer", "two, both ways"]
)
@torch.no_grad()
def test_equals_a_step_by_step_reference_bit_for_bit(cell: str, settings: dict[str, object], scheme: hb.Scheme) -> None:
    rnn = quantized(float_rnn(cell, **settings), scheme)
    x = torch.randn(9, 3, 24)
    output, states = rnn(x)
    expected, expected_states = step_by_step(rnn, x)
    assert torch.equal(output, expected)
    for state, expected_state in zip(states_of(states), expected_states, strict=True):
        assert torch.equal(state, expected_state)


@pytest.mark.parametrize("hidden", [16, 40, 48, 512])
@torch.no_grad()
def test_levels_threads_and_batches_give_equal_bits(hidden: int, restore_level: None, restore_threads: None) -> None:
    rnn = quantized(float_rnn("lstm", 24, hidden), hb.int8_dynamic())
    x = torch.randn(3, 5, 24)
    results = []
    for level in hb.available_capabilities():
        hb._extension.set_cpu_capability(level)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(rnn(x)[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(rnn(x[:, 2:3])[0], results[0][:, 2:3])


@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_weight_only(16)], ids=str)
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        {"proj_size": 12, "bidirectional": True, "num_layers": 2},
    ],
    ids=["plain", "batch first", "bidirectional", "projection"],
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_computes_what_pytorch_computes_with_the_same_weights(
    cell: str, settings: dict[str, object], scheme: hb.Scheme
) -> None:
    if "proj_size" in settings and cell != "lstm":
        settings = {name: value for name, value in settings.items() if name != "proj_size"}
    reference = float_rnn(cell, **settings)
    rnn = quantized(reference, scheme)
    for name, weight in reference.named_parameters():
        if name.startswith("weight"):
            weight.copy_(rnn.get_submodule(name.removeprefix("weight_")).weight)
    batch = (3, 7) if settings.get("batch_first") else (7, 3)
    x = torch.randn(*batch, 24)
    output, states = reference(x)
    for given in (None, states):
        expected, expected_states = reference(x, given)
        output, states = rnn(x, given)
        assert output.shape == expected.shape
        assert ((output - expected).norm() / expected.norm()).item() < 0.02
        for state, expected_state in zip(states_of(states), states_of(expected_states), strict=True):
            assert state.shape == expected_state.shape
            assert ((state - expected_state).norm() / expected_state.norm()).item() < 0.02


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_packed_sequence_equals_each_sequence_alone(cell: str, enforce_sorted: bool) -> None:
    rnn = quantized(float_rnn(cell, bidirectional=True, num_layers=2), hb.int8_dynamic())
    lengths = [6, 4, 1] if enforce_sorted else [1, 6, 4]
    x = torch.randn(6, 3, 24)
    given = torch.randn(4, 3, 32)
    hx = (given, given * 0.5) if cell == "lstm" else given
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, states = rnn(packed, hx)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    for i, length in enumerate(lengths):
        one_hx = tuple(s[:, i : i + 1] for s in hx) if cell == "lstm" else hx[:, i : i + 1]
        alone, alone_states = rnn(x[:length, i : i + 1], one_hx)
        assert torch.equal(padded[:length, i : i + 1], alone)
        for state, alone_state in zip(states_of(states), states_of(alone_states), strict=True):
            assert torch.equal(state[:, i : i + 1], alone_state)


@torch.no_grad()
def test_state_carries_over_between_calls() -> None:
    rnn = quantized(float_rnn("lstm", num_layers=2), hb.int8_dynamic())
    x = torch.randn(10, 2, 24)
    whole, whole_states = rnn(x)
    first, states = rnn(x[:4])
    second, states = rnn(x[4:], states)
    assert torch.equal(torch.cat((first, second)), whole)
    assert all(torch.equal(a, b) for a, b in zip(states, whole_states, strict=True))


@torch.no_grad()
def test_input_without_a_batch() -> None:
    rnn = quantized(float_rnn("lstm", bidirectional=True), hb.int8_dynamic())
    x = torch.randn(5, 24)
    output, (h, c) = rnn(x)
    expected, (expected_h, expected_c) = rnn(x.unsqueeze(1))
    assert torch.equal(output, expected.squeeze(1))
    assert torch.equal(h, expected_h.squeeze(1)) and torch.equal(c, expected_c.squeeze(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    rnn = quantized(float_rnn("lstm").to(dtype), hb.int8_dynamic())
    x = torch.randn(5, 2, 24, dtype=dtype)
    output, (h, c) = rnn(x)
    expected, _ = rnn(x.float())
    assert output.dtype == h.dtype == c.dtype == dtype
    assert torch.equal(output, expected.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("kind", "cell"), [(nn.LSTMCell, "lstm"), (nn.GRUCell, "gru"), (nn.RNNCell, "rnn_tanh")])
@torch.no_grad()
def test_cell_equals_the_reference_bit_for_bit(kind: type[nn.Module], cell: str, scheme: hb.Scheme) -> None:
    torch.manual_seed(0)
    reference = kind(24, 20)
    module = quantized(reference, scheme)
    x, h, c = torch.randn(3, 24), torch.randn(3, 20), torch.randn(3, 20)
    hx = (h, c) if cell == "lstm" else h
    expected_h, expected_c = functional.recurrent_step(cell, module.ih(x), module.hh(h), h, c)
    result = states_of(module(x, hx))
    assert torch.equal(result[0], expected_h)
    assert len(result) == 1 or torch.equal(result[1], expected_c)
    assert ((result[0] - states_of(reference(x, hx))[0]).norm() / expected_h.norm()).item() < 0.6
    assert torch.equal(states_of(module(x[0], (h[0], c[0]) if cell == "lstm" else h[0]))[0], result[0][0])
    assert states_of(module(x))[0].shape == (3, 20)


@pytest.mark.parametrize(("scheme", "bound"), [(hb.bf16(), 0.01), (hb.fp16(), 0.001)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("cell", "settings"),
    [
        ("gru", {"num_layers": 2}),
        ("rnn_relu", {"bidirectional": True}),
        ("lstm", {"bidirectional": True, "batch_first": True}),
        ("lstm", {"proj_size": 8}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@torch.no_grad()
def test_sixteen_bit_floats(
    cell: str, settings: dict[str, object], bias: bool, scheme: hb.Scheme, bound: float
) -> None:
    reference = float_rnn(cell, bias=bias, **settings)
    rnn = quantized(reference, scheme)
    x = torch.randn(6, 2, 24)
    hx = reference(x)[1]
    lengths = [2, 2, 1, 2, 1, 1] if reference.batch_first else [4, 6]
    packed = pack_padded_sequence(x, lengths, reference.batch_first, enforce_sorted=False)
    for given in ((x,), (x, hx), (packed,)):
        output, state = rnn(*given)
        expected, expected_state = reference(*given)
        if isinstance(output, PackedSequence):
            output, expected = output.data, expected.data
        pairs = [(output, expected), *zip(states_of(state), states_of(expected_state), strict=True)]
        for result, wanted in pairs:
            assert result.dtype == torch.float32
            assert ((result - wanted).norm() / wanted.norm()).item() < bound * (2 if rnn.proj_size else 1)


@torch.no_grad()
def test_sixteen_bit_floats_call_hooks_of_their_parts() -> None:
    rnn = quantized(float_rnn("lstm"), hb.bf16())
    x = torch.randn(6, 2, 24)
    expected = rnn(x)[0]
    seen: list[torch.Size] = []
    rnn.hh_l0.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert torch.allclose(rnn(x)[0], expected, atol=0.02)
    assert seen == [torch.Size([2, 4 * 32])] * 6


@torch.no_grad()
def test_parts_may_have_different_schemes() -> None:
    model = nn.ModuleDict({"m": float_rnn("lstm", num_layers=2)})
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"m.hh_l1": hb.int4_weight_only(16), "m.ih_l1": None})
    expected = model["m"](x := torch.randn(5, 2, 24))[0]
    plan = hb.plan(model, recipe)
    assert {row.name: str(row.scheme) for row in plan.rows} == {
        "m.ih_l0": str(hb.int8_dynamic()),
        "m.hh_l0": str(hb.int8_dynamic()),
        "m.ih_l1": "None",
        "m.hh_l1": str(hb.int4_weight_only(16)),
    }
    hb.quantize_(model, recipe, progress=False)
    assert isinstance(model["m"].ih_l1, nn.Linear)
    assert ((model["m"](x)[0] - expected).norm() / expected.norm()).item() < 0.1


def test_calibration_reaches_hidden_weights() -> None:
    model = nn.ModuleDict({"m": float_rnn("lstm", num_layers=2)})
    x = torch.randn(12, 4, 24)
    inputs, hidden = x.square().mean(dim=(0, 1)), torch.cat((torch.zeros(1, 4, 32), model["m"](x)[0][:-1]))
    seen = {}

    class Record(hb.MSE):
        def round(self, weight, weight_format, importance):  # type: ignore[no-untyped-def]
            seen[weight.shape[1], len(seen)] = importance
            return super().round(weight, weight_format, importance)

    hb.quantize_(model, hb.int4_weight_only(8), [x], [Record()], progress=False, forward=lambda m, batch: m["m"](batch))
    assert [shape for shape, _ in seen] == [24, 32, 32, 32]
    torch.testing.assert_close(seen[24, 0], inputs)
    torch.testing.assert_close(seen[32, 3], hidden.square().mean(dim=(0, 1)), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_prepared_model_computes_the_same_and_can_be_copied() -> None:
    model = nn.ModuleDict({"m": float_rnn("lstm", num_layers=2, bidirectional=True)})
    x = torch.randn(6, 2, 24)
    expected, _ = model["m"](x)
    hb.prepare_(model, hb.int8_dynamic())
    torch.testing.assert_close(model["m"](x)[0], expected)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    hb.convert_(model, progress=False)
    assert ((model["m"](x)[0] - expected).norm() / expected.norm()).item() < 0.02


def test_failed_call_leaves_the_layer_as_it_was() -> None:
    rnn = float_rnn("lstm")
    model = nn.ModuleDict({"m": rnn})

    def fail(model: nn.Module, batch: object) -> None:
        model["m"](batch)
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        hb.quantize_(model, hb.int8_dynamic(), [torch.randn(3, 2, 24)], progress=False, forward=fail)
    assert model["m"] is rnn and not rnn._forward_pre_hooks


@torch.no_grad()
def test_save_load_and_copies_give_equal_bits(tmp_path: object) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"m": float_rnn("lstm", num_layers=2), "cell": nn.GRUCell(32, 16)})

    model = build()
    hb.quantize_(model, hb.int4_int8_dynamic(16), progress=False, on_fallback="allow")
    x = torch.randn(6, 2, 24)
    expected = model["m"](x)[0]
    hb.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        skeleton = build()
    loaded = hb.load_(skeleton, tmp_path / "m.safetensors")
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other["m"](x)[0], expected)
        assert torch.equal(other["cell"](expected[0]), model["cell"](expected[0]))
    hb.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(hb.FileFormatError, match=r"'m'.*parts of a LSTM"):
        hb.load_(nn.ModuleDict({"m": nn.Linear(3, 3), "cell": nn.GRUCell(32, 16)}), tmp_path / "m.safetensors")


@torch.no_grad()
def test_export_with_a_dynamic_length_and_compile() -> None:
    rnn = quantized(float_rnn("lstm", num_layers=2, bidirectional=True, batch_first=True), hb.int8_dynamic())
    x = torch.randn(2, 7, 24)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(rnn, (x,), dynamic_shapes={"input": {1: length}})
    for steps in (7, 12):
        x = torch.randn(2, steps, 24)
        assert torch.equal(program.module()(x)[0], rnn(x)[0])
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x)[0], rnn(x)[0])


def test_gradient_says_that_there_is_none() -> None:
    rnn = quantized(float_rnn("lstm"), hb.int8_dynamic())
    output, _ = rnn(torch.randn(3, 2, 24, requires_grad=True))
    with pytest.raises(NotImplementedError, match="no gradient"):
        output.sum().backward()


X = torch.zeros(5, 3, 24)


@pytest.mark.parametrize(
    ("x", "hx", "error", "message"),
    [
        (torch.zeros(5, 3, 23), None, ValueError, "23 features in its last dimension; 24"),
        (torch.zeros(5, 3, 24, dtype=torch.int64), None, TypeError, "input is torch.int64"),
        (torch.zeros(5, 3, 3, 24), None, ValueError, "4 dimensions"),
        (torch.zeros(0, 3, 24), None, ValueError, "no steps"),
        (PackedSequence(torch.zeros(3, 1, 24), torch.tensor([2, 1])), None, ValueError, r"data .* shape \(3, 1, 24\)"),
        (
            PackedSequence(torch.zeros(3, 24), torch.tensor([2.0, 1.0])),
            None,
            TypeError,
            "batch_sizes .* are torch.float32",
        ),
        (X, torch.zeros(1, 3, 32), TypeError, "give the pair"),
        (X, (torch.zeros(1, 3, 32), torch.zeros(1, 2, 32)), ValueError, r"c_0 has shape \(1, 2, 32\); \(1, 3, 32\)"),
        (X, (torch.zeros(2, 3, 32), torch.zeros(2, 3, 32)), ValueError, r"h_0 has shape \(2, 3, 32\)"),
        (X, (torch.zeros(1, 3, 32).double(), torch.zeros(1, 3, 32)), TypeError, "h_0 has dtype torch.float64"),
        (X, (torch.zeros(1, 3, 32), torch.zeros(1, 3, 32, device="meta")), ValueError, "c_0 is on the device meta"),
    ],
)
def test_bad_input_is_refused(x: Tensor, hx: object, error: type[Exception], message: str) -> None:
    rnn = quantized(float_rnn("lstm"), hb.int8_dynamic())
    with pytest.raises(error, match=message):
        rnn(x, hx)


@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int8_dynamic(symmetric=False), hb.bf16()], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_no_sequences_give_none_as_in_pytorch(cell: str, scheme: hb.Scheme) -> None:
    rnn = float_rnn(cell)
    expected, expected_state = rnn(torch.zeros(5, 0, 24))
    output, state = quantized(rnn, scheme)(torch.zeros(5, 0, 24))
    assert output.shape == expected.shape
    assert [s.shape for s in state] == [s.shape for s in expected_state]


@pytest.mark.parametrize(
    ("batch_sizes", "message"),
    [
        ([2, 0], r"batch_sizes\[1\]=0 .* is not in 1..2"),
        ([0, 3], r"batch_sizes\[0\]=0"),
        ([1, 2], r"batch_sizes\[1\]=2 .* is not in 1..1"),
        ([3, 1], "add up to 4, its data has 3 rows"),
        ([2, -1, 2], r"batch_sizes\[1\]=-1"),
    ],
)
@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.bf16()], ids=str)
def test_bad_packed_sequence_is_refused(batch_sizes: list[int], message: str, scheme: hb.Scheme) -> None:
    rnn = quantized(float_rnn("lstm"), scheme)
    packed = PackedSequence(torch.zeros(3, 24), torch.tensor(batch_sizes), None, None)
    with pytest.raises(ValueError, match=message):
        rnn(packed)


@pytest.mark.parametrize(
    ("hx", "error", "message"),
    [
        (torch.zeros(2, 31), ValueError, r"h has shape \(2, 31\); \(2, 32\) is needed"),
        (torch.zeros(3, 32), ValueError, r"h has shape \(3, 32\)"),
        (torch.zeros(2, 32).double(), TypeError, "h has dtype torch.float64, the input torch.float32"),
        ([0.0], TypeError, "h is a list"),
    ],
)
def test_bad_state_of_a_cell_is_refused(hx: object, error: type[Exception], message: str) -> None:
    cell = quantized(nn.GRUCell(24, 32), hb.int8_dynamic())
    with pytest.raises(error, match=message):
        cell(torch.zeros(2, 24), hx)
    with pytest.raises(ValueError, match=r"use \[B, 24\]"):
        cell(torch.zeros(2, 23))


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1)])
def test_opcheck(cell: str, gates: int) -> None:
    index = ["lstm", "gru", "rnn_tanh"].index(cell)
    h, c = torch.randn(2, 16), torch.randn(2, 16) if cell == "lstm" else None
    codes = torch.randint(-8, 8, (gates * 16, 16), dtype=torch.int8)
    packed, scale = hb.ops.pack(codes, 4, layout="tiles"), torch.rand(1, gates * 16)
    projection = (None, None, None, None, 0, 0, False, None, None, None)
    for x, sizes in ((torch.randn(3, 2, gates * 16), None), (torch.randn(5, gates * 16), torch.tensor([2, 2, 1]))):
        torch.library.opcheck(
            torch.ops.halfbyte.recurrent.default,
            (
                x,
                h,
                c,
                packed,
                scale,
                None,
                torch.randn(gates * 16),
                index,
                4,
                16,
                True,
                None,
                None,
                False,
                sizes,
                *projection,
            ),
        )
    state = {"lstm": c, "gru": h}.get(cell)
    x_gates, h_gates = torch.randn(2, 2, gates * 16)
    torch.library.opcheck(torch.ops.halfbyte.recurrent_cell.default, (x_gates, h_gates, state, index))


@pytest.mark.parametrize("scheme", [hb.int8_dynamic(), hb.int4_weight_only(8), hb.int4_int8_dynamic(8)], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@torch.no_grad()
def test_projection_equals_a_step_by_step_reference_bit_for_bit(scheme: hb.Scheme, restore_threads: None) -> None:
    rnn = quantized(float_rnn("lstm", hidden=512, proj_size=40, bidirectional=True), scheme)
    packed = pack_padded_sequence(torch.randn(6, 3, 24), [6, 4, 1])
    states = torch.randn(2, 3, 40), torch.randn(2, 3, 512)
    expected_steps = []
    h, c = states[0][0], states[1][0]
    for token in pad_packed_sequence(packed)[0][:, :1]:  # the sequence that has all steps, forwards
        h, c = functional.recurrent_step("lstm", rnn.ih_l0(token), rnn.hh_l0(h[:1]), h[:1], c[:1])
        h = rnn.hr_l0(h)
        expected_steps.append(h)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        output, last = rnn(packed, states)
        results.append((output.data, *last))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(pad_packed_sequence(output)[0][:, 0, :40], torch.cat(expected_steps))
    assert torch.equal(last[0][0, 0], expected_steps[-1][0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("both_ways", [False, True])
@torch.no_grad()
def test_packed_steps_of_many_threads_give_equal_bits(cell: str, both_ways: bool, restore_threads: None) -> None:
    directions = 2 if both_ways else 1
    rnn = quantized(float_rnn(cell, hidden=512, bidirectional=both_ways), hb.int8_dynamic())
    packed = pack_padded_sequence(torch.randn(7, 4, 24), [7, 5, 5, 2])
    states = (torch.randn(directions, 4, 512), torch.randn(directions, 4, 512))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        output, last = rnn(packed, states if cell == "lstm" else states[0])
        results.append((output.data, *states_of(last)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("zero_point", [0, 7])
@torch.no_grad()
def test_given_scale_of_the_hidden_state_gives_the_integers_of_linear_int8(zero_point: int) -> None:
    rnn = quantized(float_rnn("lstm"), hb.int8_dynamic())
    hh, x_gates = rnn.hh_l0, torch.randn(6, 3, 128)
    qparams = {"act_scale": torch.tensor(1 / 127), "act_zero_point": torch.tensor(zero_point, dtype=torch.int32)}
    weight = (hh.qweight, hh.scale, hh.zero_point, hh.bias)
    h = c = torch.zeros(3, 32)
    output, _, _ = hb.ops.recurrent(x_gates, h, c, *weight, cell="lstm", bits=8, group_size=32, int8=True, **qparams)
    for x, expected in zip(x_gates, output, strict=True):
        h_gates = hb.ops.linear_int8(h, *weight, bits=8, out_features=128, group_size=32, **qparams)
        h, c = functional.recurrent_step("lstm", x, h_gates, h, c)
        assert torch.equal(h, expected)


@pytest.mark.parametrize("scheme", [hb.int8_static(), hb.nf4_weight_only(8), hb.int8_dynamic(symmetric=False)], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@torch.no_grad()
def test_projection_follows_its_scheme_as_a_layer_of_its_own_does(scheme: hb.Scheme) -> None:
    model = nn.ModuleDict({"m": float_rnn("lstm", proj_size=16)})
    x = torch.randn(6, 3, 24)
    data = [x] if scheme.static else None
    hb.quantize_(model, scheme, data, progress=False, forward=lambda m, batch: m["m"](batch), on_fallback="allow")
    rnn = model["m"]
    output, _ = rnn(x)
    h, c = torch.zeros(3, 16), torch.zeros(3, 32)
    for token, expected in zip(x, output, strict=True):
        h, c = functional.recurrent_step("lstm", rnn.ih_l0(token), rnn.hh_l0(h), h, c)
        h = rnn.hr_l0(h)
        assert torch.equal(h, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@torch.no_grad()
def test_static_scales_equal_a_step_by_step_reference(symmetric: bool) -> None:
    reference = float_rnn("lstm", num_layers=2, bidirectional=True)
    model = nn.ModuleDict({"m": copy.deepcopy(reference)})
    x = torch.randn(9, 3, 24)
    scheme = hb.int8_static(symmetric=symmetric)
    hb.quantize_(model, scheme, [x], progress=False, forward=lambda m, batch: m["m"](batch))
    rnn = model["m"]
    assert rnn.hh_l1.act_scale is not None
    output, states = rnn(x)
    expected, expected_states = step_by_step(rnn, x)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))
    assert ((output - reference(x)[0]).norm() / output.norm()).item() < 0.03


@torch.no_grad()
def test_many_callers_at_a_time_do_not_wait_for_one_another() -> None:
    rnn = quantized(float_rnn("lstm", hidden=512), hb.int8_dynamic())
    x = torch.randn(20, 2, 24)
    expected = rnn(x)[0]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: rnn(x)[0], range(8)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
@torch.no_grad()
def test_other_layers_are_exported_compiled_copied_and_pickled(kind: type[nn.RNNBase]) -> None:
    rnn = quantized(kind(24, 32, num_layers=2, batch_first=True).eval(), hb.int4_int8_dynamic(8))
    x = torch.randn(2, 7, 24)
    expected = rnn(x)[0]
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(rnn, (x,), dynamic_shapes={"input": {1: length}})
    longer = torch.randn(2, 12, 24)
    assert torch.equal(program.module()(longer)[0], rnn(longer)[0])
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    for other in (compiled, copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(other(x)[0], expected)
