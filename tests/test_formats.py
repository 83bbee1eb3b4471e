"""Formats: what can be written is what works."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import halfbyte as hb
from halfbyte.formats import format_from_dict

granularities = st.one_of(
    st.just(hb.PerTensor()),
    st.integers(0, 3).map(hb.PerAxis),
    st.integers(1, 256).map(hb.PerGroup),
    st.just(hb.PerToken()),
)


@st.composite
def int_formats(draw: st.DrawFn) -> hb.IntFormat:
    bits = draw(st.integers(1, 8))
    symmetric = bits == 1 or draw(st.booleans())
    return hb.IntFormat(
        bits=bits,
        symmetric=symmetric,
        granularity=draw(granularities),
        narrow_range=symmetric and bits > 1 and draw(st.booleans()),
        scale_dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


@given(int_formats())
def test_int_format_survives_json(fmt: hb.IntFormat) -> None:
    assert format_from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


@given(int_formats())
def test_codes_fit_in_bits(fmt: hb.IntFormat) -> None:
    assert fmt.qmin < fmt.qmax
    levels = 2 if fmt.binary else fmt.qmax - fmt.qmin + 1
    assert levels <= 2**fmt.bits
    assert fmt.qmin <= 0 <= fmt.qmax


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 1, "symmetric": False}, "bits=1"),
        ({"bits": 4, "symmetric": False, "narrow_range": True}, "narrow_range"),
        ({"bits": 4, "scale_dtype": torch.float64}, "float64"),
    ],
)
def test_impossible_int_format_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hb.IntFormat(**fields)


@pytest.mark.parametrize("bits", [4.0, "4", True, None])
def test_bits_of_wrong_type_are_refused(bits: object) -> None:
    with pytest.raises(TypeError, match="bits="):
        hb.IntFormat(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [0, -32])
def test_group_size_must_be_positive(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size={group_size}"):
        hb.int4_weight_only(group_size=group_size)


@pytest.mark.parametrize("group_size", [32.0, True, "32"])
def test_group_size_of_wrong_type_is_refused(group_size: object) -> None:
    with pytest.raises(TypeError, match="group_size="):
        hb.int4_weight_only(group_size=group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0, 9])
def test_int_weight_only_refuses_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}"):
        hb.int_weight_only(bits)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "float"},
        {"kind": "float", "dtype": "float64"},
        {"kind": "float", "dtype": "bfloat16", "more": 1},
        {"kind": "codebook"},
        {},
        {**hb.IntFormat(bits=4).to_dict(), "granularity": {"per": "axis", "axis": 0, "other": 1}},
        {**hb.IntFormat(bits=4).to_dict(), "granularity": {"per": "row"}},
        {**hb.IntFormat(bits=4).to_dict(), "bits": "4"},
    ],
)
def test_unknown_fields_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError):
        format_from_dict(fields)


ALL_SCHEMES = [
    hb.int8_dynamic(),
    hb.int8_weight_only(),
    hb.int4_weight_only(),
    hb.int4_weight_only(group_size=32, symmetric=True),
    *(hb.int_weight_only(bits) for bits in range(1, 9)),
    hb.int_weight_only(3, group_size=64),
    hb.ternary_weight_only(),
    hb.int4_int8_dynamic(),
    hb.bf16(),
    hb.fp16(),
]


@pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)
def test_scheme_survives_json(scheme: hb.Scheme) -> None:
    assert hb.Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_scheme_refuses_what_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="per token"):
        hb.Scheme(weight=hb.IntFormat(bits=8, granularity=hb.PerToken()))
    with pytest.raises(ValueError, match="per tensor"):
        hb.Scheme(weight=hb.CodebookFormat(hb.formats.NF4_VALUES, hb.PerTensor()))
    with pytest.raises(ValueError, match="no kernel"):
        hb.Scheme(weight=hb.IntFormat(bits=8), activation=hb.IntFormat(bits=4, granularity=hb.PerToken()))
    with pytest.raises(ValueError, match="integer weights"):
        hb.Scheme(weight=hb.FloatFormat(dtype=torch.bfloat16), activation=hb.int8_dynamic().activation)


def test_formats_are_values() -> None:
    assert hb.int8_dynamic() == hb.int8_dynamic()
    assert len({hb.int8_dynamic(), hb.int8_dynamic(), hb.bf16()}) == 2
    with pytest.raises(AttributeError):
        hb.int8_dynamic().weight.bits = 4  # type: ignore[misc, union-attr]


codebooks = st.builds(
    lambda values, granularity, dtype: hb.CodebookFormat(tuple(sorted(values)), granularity, dtype),
    st.sets(st.integers(-1000, 1000).map(lambda n: n / 64), min_size=2, max_size=16),
    granularities,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)


@given(codebooks)
def test_codebook_format_survives_json_and_its_codes_fit(fmt: hb.CodebookFormat) -> None:
    assert format_from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt
    assert 2 ** (fmt.bits - 1) < len(fmt.values) <= 2**fmt.bits
    assert fmt.table().shape == (16,)
    assert fmt.table()[: len(fmt.values)].tolist() == list(fmt.values)


def test_known_codebooks_are_those_of_their_definitions() -> None:
    positive = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -torch.distributions.Normal(0, 1).icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64))[:-1]
    quantiles = torch.cat([positive, torch.zeros(1), negative]).sort().values
    nf4 = torch.tensor(hb.formats.NF4_VALUES)
    torch.testing.assert_close(nf4, (quantiles / quantiles.abs().max()).float(), rtol=1e-6, atol=1e-6)
    e2m1 = {s * (2.0 ** (e - 1) * (1 + m / 2) if e else m / 2) for s in (1, -1) for e in range(4) for m in (0, 1)}
    assert sorted(e2m1) == list(hb.formats.FP4_VALUES)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((0.0,), ValueError, "1 entries; use 2 to 16"),
        (tuple(range(17)), ValueError, "17 entries"),
        ((0.0, 0.0, 1.0), ValueError, "increasing order"),
        ((1.0, -1.0), ValueError, "increasing order"),
        ((0.0, float("inf")), ValueError, "finite"),
        ((0.0, 1e300), ValueError, "finite"),
        ((0.0, 1e-6), ValueError, "between 1e-4 and 1e4"),
        (("a", "b"), TypeError, "not all numbers"),
        (3, TypeError, "not a sequence"),
    ],
)
def test_impossible_codebook_is_refused(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hb.CodebookFormat(values)  # type: ignore[arg-type]


def test_codebook_has_no_integer_activations() -> None:
    activation = hb.int8_dynamic().activation
    with pytest.raises(ValueError, match="integer activations need integer weights, not nf4"):
        hb.Scheme(weight=hb.nf4_weight_only().weight, activation=activation)
