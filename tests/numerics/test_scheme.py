"""Scheme: legal combinations, text there and back, bits per weight; and the tree of errors."""

import doctest
import importlib
import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import errors
from bitwright.errors import BitwrightError, InputError, NumericsError, SchemeError, VerificationError
from bitwright.numerics.codec import fit
from bitwright.numerics.scheme import GRIDS, GROUPS, PRESETS, SCALE_BITS, ZEROS, Scheme

ALL_GROUPS = (*GROUPS, "channel", "tensor")
COMBINATIONS = list(itertools.product(GRIDS, ALL_GROUPS, ZEROS, SCALE_BITS))


def means_something(grid: str, group: int | str, zero: str, scale: str) -> bool:
    """The rules, said once more: offsets only on integer grids, k scales only in groups, minima only where they fit, the
    odd scales of grids with a codebook not in 4 bits."""
    if scale == "k4" and grid in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"):
        return False
    if zero == "signed":
        return (
            (grid.startswith("int") or grid in ("nf4", "iq4nl"))
            and means_something("int4", group, "sym", scale)
            and (scale not in ("e8m0", "e4m3", "dq8"))
        )
    if zero != "sym" and not (grid.startswith("int") and grid[3:].isdigit()):
        return False
    if scale in {"k8", "k6", "k4"} and isinstance(group, str):
        return False
    return not (zero == "min" and scale in {"k8", "e8m0", "e4m3", "dq8"})


LEGAL = [c for c in COMBINATIONS if means_something(*c)]


def test_legal_combinations_are_exactly_those_that_mean_something() -> None:
    accepted = []
    for combination in COMBINATIONS:
        try:
            Scheme(*combination)
        except SchemeError:
            continue
        accepted.append(combination)
    assert accepted == LEGAL
    assert 1000 < len(LEGAL) < len(COMBINATIONS)


def test_every_legal_scheme_prints_and_parses_back() -> None:
    texts = {}
    for combination in LEGAL:
        scheme = Scheme(*combination)
        assert Scheme.parse(str(scheme)) == scheme
        texts[str(scheme)] = scheme
    assert len(texts) == len(LEGAL), "two schemes print alike"


def test_every_legal_scheme_parses_from_its_four_parts() -> None:
    for grid, group, zero, scale in LEGAL:
        name = f"g{group}" if isinstance(group, int) else group
        assert Scheme.parse(f"{grid}-{name}-{zero}-{scale}") == Scheme(grid, group, zero, scale)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme == Scheme.parse(PRESETS[name]) == Scheme.parse(name.upper()) == Scheme.parse(str(scheme))
    assert str(scheme) == {"q8_0": "int8-g32"}.get(name, name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4-g128", Scheme("int4", 128, "sym", "f16")),
        ("INT4-G128-ASYM", Scheme("int4", 128, "asym", "f16")),
        ("int3-g64-asym1-bf16", Scheme("int3", 64, "asym1", "bf16")),
        ("nf4-g64", Scheme("nf4", 64, "sym", "f32")),
        ("nf4-g64-dq", Scheme("nf4", 64, "sym", "dq8")),
        ("nf4-g64-dq8", Scheme("nf4", 64, "sym", "dq8")),
        ("fp8-tensor", Scheme("fp8", "tensor", "sym", "f32")),
        ("ternary-channel", Scheme("ternary", "channel", "sym", "f16")),
        ("q4_k", Scheme("int4", 32, "min", "k6")),
        ("nvfp4", Scheme("fp4", 16, "sym", "e4m3")),
    ],
)
def test_parse(text: str, expected: Scheme) -> None:
    assert Scheme.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "found", "remedy"),
    [
        ("", "unknown scheme ''", "q4_k"),
        ("int4", "unknown scheme 'int4'", "int4-g128"),
        ("q9_k", "unknown scheme 'q9_k'", "mxfp4"),
        ("int9-g128", "unknown grid 'int9'", "ternary"),
        ("q4_k-f16", "unknown grid 'q4_k'", "nf4"),
        ("int4-g100", "unknown group 100", "g16, g32, g64, g128, g256, channel, tensor"),
        ("int4-128", "unknown group '128'", "g128"),
        ("int4-g", "unknown group 'g'", "g128"),
        ("int4-row", "unknown group 'row'", "channel"),
        ("int4-g128-f17", "unknown scale encoding 'f17'", "bf16"),
        ("int4-g128-f16-asym", "parts left over: asym", "GRID-GROUP[-ZERO][-SCALE]"),
        ("int4-g128-asym-f16-f16", "parts left over: f16", "GRID-GROUP[-ZERO][-SCALE]"),
        ("nf4-g64-asym", "grid nf4 has no zero point", "leave out the zero part"),
        ("ternary-channel-min", "grid ternary has no zero point", "leave out the zero part"),
        ("int4-channel-k6", "scale encoding k6 needs groups", "use g16 or g32"),
        ("int6-tensor-k8", "scale encoding k8 needs groups", "use g16 or g32"),
        ("int4-g32-min-k8", "scale encoding k8 cannot hold a float minimum", "f16, k6 or k4"),
        ("int4-g32-min-e8m0", "scale encoding e8m0 cannot hold a float minimum", "f16, k6 or k4"),
        ("int4-g32-min-dq", "scale encoding dq8 cannot hold a float minimum", "f16, k6 or k4"),
    ],
)
def test_a_refusal_says_what_was_found_and_what_to_do(text: str, found: str, remedy: str) -> None:
    with pytest.raises(SchemeError) as caught:
        Scheme.parse(text)
    assert found in caught.value.message
    assert remedy in caught.value.remedy


def test_unknown_zero_is_refused() -> None:
    with pytest.raises(SchemeError, match="unknown zero 'both'") as caught:
        Scheme("int4", 128, "both")  # type: ignore[arg-type]
    assert caught.value.remedy == "one of sym, signed, asym, asym1, min"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*GRIDS, *PRESETS, *ZEROS, *SCALE_BITS, "g32", "g", "g0", "channel", "", "²"]), max_size=5)
)
def test_any_text_parses_or_is_a_scheme_error(parts: list[str]) -> None:
    text, remedy = "-".join(parts), "a remedy"
    try:
        scheme = Scheme.parse(text)
        assert Scheme.parse(str(scheme)) == scheme
    except SchemeError as error:
        remedy = error.remedy
    assert remedy


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("q2_k", 2.625),
        ("q3_k", 3.4375),
        ("q4_k", 4.5),
        ("q5_k", 5.5),
        ("q6_k", 6.5625),
        ("q4_0", 4.5),
        ("q4_1", 5.0),
        ("q5_0", 5.5),
        ("q5_1", 6.0),
        ("q8_0", 8.5),
        ("iq4_nl", 4.5),
        ("iq4_xs", 4.25),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("int4-g128", 4.125),
        ("int4-g128-asym", 4.15625),
        ("int4-g128-f32", 4.25),
        ("int3-g64-asym", 3 + 19 / 64),
        ("nf4-g64", 4.5),
        ("nf4-g64-dq", 4 + (8 + 32 / 256) / 64),
        ("int8-channel", 8 + 16 / 1024),
        ("int8-channel-asym", 8 + 24 / 1024),
        ("fp8-channel", 8 + 32 / 1024),
        ("int8-tensor", 8.0),
        ("ternary-channel", 2 + 16 / 1024),
        ("binary-g128", 1.125),
    ],
)
def test_bits_per_weight(text: str, bits: float) -> None:
    assert Scheme.parse(text).bits_per_weight(1024) == pytest.approx(bits, abs=1e-12)


def test_bits_per_weight_of_a_whole_tensor_with_zero_point() -> None:
    assert Scheme.parse("int8-tensor-asym").bits_per_weight(128) == 8.0


@pytest.mark.parametrize(
    ("group", "zero", "scale"), [c[1:] for c in LEGAL if c[0] == "int4" and c[1] in (16, 256, "channel")]
)
def test_bits_per_weight_counts_what_is_stored(group: int | str, zero: str, scale: str) -> None:
    """Count the elements of the tables that `fit` returns, at their widths."""
    scheme, N, K = Scheme("int4", group, zero, scale), 256, 512  # type: ignore[arg-type]
    scales = fit(torch.ones(N, K), scheme)
    bits = 4 * N * K + scales.scale.numel() * SCALE_BITS[scale]
    if zero not in ("sym", "signed"):
        assert scales.zero is not None
        bits += scales.zero.numel() * (SCALE_BITS[scale] if zero == "min" else 4)
    if scale in {"k8", "k6", "k4"}:
        assert scales.outer is not None
        bits += scales.outer.numel() * 16 * (2 if zero == "min" else 1)
    if scale == "dq8":
        assert scales.outer is not None
        bits += scales.outer.numel() * 32
    assert scheme.bits_per_weight(K) == pytest.approx(bits / (N * K), abs=1e-12)


def test_bits_per_weight_charges_a_short_last_group_in_full() -> None:
    assert Scheme.parse("int4-g32").bits_per_weight(33) == pytest.approx(4 + 2 * 16 / 33)
    assert Scheme.parse("q4_k").bits_per_weight(257) == pytest.approx(4 + 2 * (9 * 6 + 2 * 16) / 257)


def test_groups_units_and_rows() -> None:
    g64, channel, tensor = (Scheme.parse(f"int4-{group}") for group in ("g64", "channel", "tensor"))
    assert [g64.groups(K) for K in (1, 64, 65, 128)] == [1, 1, 2, 2]
    assert (channel.groups(1000), tensor.groups(1000)) == (1, 1)
    assert (g64.group_length(1000), channel.group_length(1000), tensor.group_length(1000)) == (64, 1000, 1000)
    units = {
        text: Scheme.parse(text).unit
        for text in ("int4-g64", "q4_k", "q3_k", "int4-channel", "int4-tensor", "nf4-g64-dq")
    }
    assert units == {
        "int4-g64": 64,
        "q4_k": 256,
        "q3_k": 256,
        "int4-channel": None,
        "int4-tensor": None,
        "nf4-g64-dq": None,
    }
    rowwise = [
        text
        for text in ("int4-g64", "q4_k", "int8-channel", "mxfp4", "nvfp4", "nf4-g64-dq", "int8-tensor")
        if Scheme.parse(text).rowwise
    ]
    assert rowwise == ["int4-g64", "q4_k", "int8-channel", "mxfp4"]


def test_with_scale_checks_again() -> None:
    assert Scheme.parse("int4-g128").with_scale("bf16") == Scheme.parse("int4-g128-bf16")
    with pytest.raises(SchemeError, match="cannot hold a float minimum"):
        Scheme.parse("q4_k").with_scale("e4m3")


def test_a_scheme_is_frozen_and_hashable() -> None:
    scheme = Scheme.parse("int4-g128")
    with pytest.raises(AttributeError):
        scheme.grid = "int8"  # type: ignore[misc]
    assert {scheme: 1}[Scheme.parse("int4-g128-sym-f16")] == 1


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids_are_twos_complement(bits: int) -> None:
    grid = GRIDS[f"int{bits}"]
    assert (grid.bits, grid.lo, grid.hi, grid.levels) == (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, None)
    assert grid.reach == (127.0 if bits == 8 else 2 ** (bits - 1) - 0.5)


def test_nf4_levels_are_normal_quantiles() -> None:
    """QLoRA's construction: 8 quantiles above zero, 7 below, between 1/2 and 0.9677083, scaled to 1."""
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = sorted([*positive, 0.0, *negative])
    assert GRIDS["nf4"].levels == pytest.approx([value / max(expected) for value in expected], abs=1e-6)


def minifloat(pattern: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a bit pattern, by the definition of a binary floating-point number."""
    sign = -1.0 if pattern >> (exponent_bits + mantissa_bits) else 1.0
    exponent = pattern >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = (pattern & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * (math.ldexp(fraction, 1 - bias) if exponent == 0 else math.ldexp(1 + fraction, exponent - bias))


def test_fp4_is_e2m1() -> None:
    assert GRIDS["fp4"].levels == tuple(minifloat(pattern, 2, 1, bias=1) for pattern in range(16))


def test_fp8_is_e4m3_without_nan() -> None:
    expected = [minifloat(pattern, 4, 3, bias=7) for pattern in range(256)]
    expected[0x7F], expected[0xFF] = 448.0, -448.0  # the NaN patterns
    assert GRIDS["fp8"].levels == tuple(expected)


def test_small_grids() -> None:
    assert GRIDS["binary"].levels == (-1.0, 1.0)
    assert (GRIDS["ternary"].lo, GRIDS["ternary"].hi, GRIDS["ternary"].bits) == (-1, 1, 2)
    levels = GRIDS["iq4nl"].levels
    assert levels is not None
    assert list(levels) == sorted(levels)
    assert (len(levels), levels[0], levels[-1]) == (16, -127.0, 113.0)


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_error_names_the_thing_and_the_remedy() -> None:
    error = SchemeError("does not fit", where="model.layers.0", remedy="use g32")
    assert str(error) == "model.layers.0: does not fit\n  remedy: use g32"
    assert str(SchemeError("does not fit")) == "does not fit"
    assert error.as_dict() == {"error": "does not fit", "where": "model.layers.0", "remedy": "use g32"}


def test_the_tree_of_errors() -> None:
    kinds = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, BitwrightError)}
    inputs = {kind for kind in kinds if issubclass(kind, InputError)}
    assert kinds - inputs == {BitwrightError, NumericsError, VerificationError}
    assert {kind.__name__ for kind in inputs - {InputError}} == {
        "SchemeError",
        "CheckpointError",
        "RecipeError",
        "CalibrationError",
        "FormatError",
        "KernelError",
        "OutputError",
    }


@pytest.mark.parametrize("name", ["scheme", "packing", "codec"])
def test_doctests(name: str) -> None:
    failures, tried = doctest.testmod(importlib.import_module(f"bitwright.numerics.{name}"))
    assert tried > 0
    assert failures == 0
