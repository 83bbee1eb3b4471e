"""Plans and recipes: what each module gets, what it costs, and why something stays in floating point."""

import pytest
import torch
from torch import nn

import halfbyte as hb


class TiedModel(nn.Module):
    def __init__(self, vocabulary: int = 100, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(tokens))))


class ScaledAttention(nn.MultiheadAttention):
    def forward(self, *args: object, **kwargs: object) -> object:
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def rows_of(plan: hb.Plan) -> dict[str, hb.PlanRow]:
    return {row.name: row for row in plan.rows}


def test_plan_changes_nothing() -> None:
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    hb.plan(model, hb.int4_weight_only(32))
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_plan_works_on_the_meta_device_with_the_same_bytes() -> None:
    with torch.device("meta"):
        skeleton = TiedModel()
    on_meta, on_cpu = hb.plan(skeleton, hb.int4_weight_only(32)), hb.plan(TiedModel(), hb.int4_weight_only(32))
    assert on_meta.to_dict() == on_cpu.to_dict()


@pytest.mark.parametrize(
    "scheme",
    [hb.int8_dynamic(), hb.int4_weight_only(32), hb.int_weight_only(3, 32), hb.int_weight_only(5), hb.bf16()],
    ids=str,
)
@pytest.mark.parametrize("build", [mlp, TiedModel])
def test_planned_bytes_are_the_bytes_of_the_converted_model(scheme: hb.Scheme, build: type) -> None:
    model = build()
    plan = hb.plan(model, scheme)
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    assert plan.bytes_before == sum(t.nbytes for t in tensors.values())
    hb.quantize_(model, plan, progress=False)
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    assert plan.bytes_after == sum(t.nbytes for t in tensors.values())


def test_override_by_name_type_and_regular_expression() -> None:
    model = mlp()
    recipe = hb.Recipe(
        default=hb.int8_dynamic(),
        overrides={nn.Linear: hb.int4_weight_only(32), "re:[0-1]": None, "2": hb.int8_weight_only()},
    )
    rows = rows_of(hb.plan(model, recipe))
    assert rows["0"].scheme is None
    assert rows["0"].reason == "left as it is by the recipe"
    assert rows["2"].scheme == hb.int8_weight_only()


def test_pattern_that_matches_nothing_names_the_nearest() -> None:
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"bodi": None})
    with pytest.raises(hb.QuantizationError, match=r"'bodi' matches no module.*body"):
        hb.plan(TiedModel(), recipe)
    with pytest.raises(hb.QuantizationError, match="Conv2d matches no module"):
        hb.plan(TiedModel(), hb.Recipe(default=hb.int8_dynamic(), overrides={nn.Conv2d: None}))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (hb.int8_dynamic, r"call it: hb.int8_dynamic\(\)"),
        ("int8", "'int8' is not a scheme"),
        (None, "None is not a scheme"),
    ],
)
def test_unknown_scheme_is_refused(recipe: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hb.plan(mlp(), recipe)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message):
        hb.quantize_(mlp(), recipe)  # type: ignore[arg-type]


def test_recipe_refuses_what_is_no_pattern_or_scheme() -> None:
    with pytest.raises(TypeError, match="neither a name pattern nor a module type"):
        hb.Recipe(default=None, overrides={3: None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not a scheme"):
        hb.Recipe(default=None, overrides={"a": "int8"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="regular expression"):
        hb.Recipe(default=None, overrides={"re:(": None})


@pytest.mark.parametrize(
    ("in_features", "asked", "used"), [(48, 32, 24), (100, 32, 25), (172, 32, 43), (16, 128, 16), (7, 32, 7)]
)
def test_group_size_that_does_not_divide_falls_back(in_features: int, asked: int, used: int) -> None:
    plan = hb.plan(nn.Sequential(nn.Linear(in_features, 8)), hb.int4_weight_only(asked))
    (row,) = plan.rows
    assert row.scheme is not None
    assert row.scheme.weight.granularity == hb.PerGroup(used)
    (fallback,) = plan.fallbacks
    assert (fallback.module, fallback.kind) == ("0", "group_size")
    assert f"group_size={asked} does not divide in_features={in_features}" in fallback.message


def test_tied_table_shares_one_format_of_eight_bits() -> None:
    rows = rows_of(hb.plan(TiedModel(), hb.int4_weight_only(32)))
    assert rows["embed"].tied_to == "head"
    assert rows["embed"].scheme == hb.int8_weight_only()
    assert rows["head"].scheme == hb.int8_weight_only()
    assert rows["body"].scheme == hb.int4_weight_only(32)
    assert rows["norm"].scheme is None
    assert "normalization" in rows["norm"].reason


def test_override_of_one_tied_module_is_followed_by_the_other() -> None:
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"head": hb.int4_int8_dynamic(32)})
    rows = rows_of(hb.plan(TiedModel(), recipe))
    assert rows["embed"].scheme == hb.int4_weight_only(32)
    assert rows["head"].scheme == hb.int4_int8_dynamic(32)
    rows = rows_of(hb.plan(TiedModel(), hb.Recipe(default=hb.int8_dynamic(), overrides={"head": None})))
    assert rows["embed"].scheme is None
    assert rows["head"].scheme is None


def test_conflicting_overrides_of_tied_modules_are_a_fallback() -> None:
    recipe = hb.Recipe(
        default=hb.int8_dynamic(), overrides={"head": hb.int4_weight_only(32), "embed": hb.int8_weight_only()}
    )
    plan = hb.plan(TiedModel(), recipe)
    assert [f.kind for f in plan.fallbacks] == ["tied_weights"]
    model = TiedModel()
    hb.quantize_(model, plan, progress=False, on_fallback="allow")
    assert model.embed.weight_format.bits == 8
    assert model.head.weight_format.bits == 4


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "normalization"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU()), "no quantized form of PReLU"),
        (nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, max_norm=1.0)), "max_norm"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()), "float64"),
        (nn.Sequential(nn.Linear(4, 4), ScaledAttention(4, 1)), "ScaledAttention has a forward of its own"),
        (nn.Sequential(nn.Linear(4, 4), ScaledAttention(4, 1)), "past its forward"),
        (nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4).double()), "float64"),
    ],
)
def test_what_stays_in_float_has_a_reason(model: nn.Sequential, reason: str) -> None:
    plan = hb.plan(model, hb.int8_dynamic())
    assert any(reason in row.reason for row in plan.rows if row.scheme is None)


def test_subclass_with_its_own_forward_stays_in_float() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    rows = rows_of(hb.plan(nn.Sequential(nn.Linear(4, 4), Doubled(4, 4)), hb.int8_dynamic()))
    assert rows["1"].scheme is None
    assert "forward of its own" in rows["1"].reason


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(), "no parameters"),
        (nn.Sequential(nn.ReLU()), "no parameters"),
        (nn.Sequential(nn.LayerNorm(4)), "normalization"),
        (nn.Linear(4, 4), "wrap it"),
    ],
)
def test_model_with_nothing_to_quantize_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(hb.QuantizationError, match=message):
        hb.plan(model, hb.int8_dynamic())


def test_plan_for_another_model_is_refused() -> None:
    plan = hb.plan(mlp(), hb.int8_dynamic())
    with pytest.raises(hb.QuantizationError, match="another model: 0 has weight shape"):
        hb.quantize_(nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10)), plan)
    with pytest.raises(hb.QuantizationError, match="the plan names 2"):
        hb.quantize_(nn.Sequential(nn.Linear(64, 128)), plan)


def test_plan_prints_every_module_with_kernel_and_total() -> None:
    text = str(hb.plan(TiedModel(), hb.int4_weight_only(32)))
    for word in ("embed", "body", "head", "norm", "matmul u4 f32", "tied to head", "total", "x smaller"):
        assert word in text
    assert "<table>" in hb.plan(TiedModel(), hb.int4_weight_only(32))._repr_html_()
