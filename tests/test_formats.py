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
    with pytest.raises(ValueError, match="per tensor"):
        hb.Scheme(weight=hb.IntFormat(bits=8, granularity=hb.PerTensor()))
    with pytest.raises(ValueError, match="no kernel"):
        hb.Scheme(weight=hb.IntFormat(bits=8), activation=hb.IntFormat(bits=4, granularity=hb.PerToken()))
    with pytest.raises(ValueError, match="integer weights"):
        hb.Scheme(weight=hb.FloatFormat(dtype=torch.bfloat16), activation=hb.int8_dynamic().activation)


def test_formats_are_values() -> None:
    assert hb.int8_dynamic() == hb.int8_dynamic()
    assert len({hb.int8_dynamic(), hb.int8_dynamic(), hb.bf16()}) == 2
    with pytest.raises(AttributeError):
        hb.int8_dynamic().weight.bits = 4  # type: ignore[misc, union-attr]
