"""bitwright's own format: every scheme comes back bit for bit, costs what it promises, and a bad file is an error."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bitwright
from bitwright.errors import CheckpointError, FormatError, InputError, SchemeError
from bitwright.files.checkpoint import Checkpoint, write_shard
from bitwright.formats import FORMATS, READERS, Layer
from bitwright.formats.native_reader import dynamic_type, minifloat
from bitwright.models.source import WeightSource
from bitwright.numerics import codec
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Outliers, QTensor, Scales
from bitwright.numerics.scheme import GRIDS, GROUPS, SCALE_BITS, ZEROS, Scheme
from bitwright.pipeline.ledger import from_jsonl
from conftest import make_checkpoint

NATIVE = FORMATS["bitwright"]
SHAPES = ((5, 24), (3, 96), (2, 256), (5, 352), (7, 520), (1, 7))
NAME = "model.layers.0.mlp.up_proj"


def schemes(grid: str) -> list[Scheme]:
    """Every scheme of a grid that means something for weights."""
    found = []
    for group in (*GROUPS, "channel", "tensor"):
        for zero in ZEROS:
            for scale in SCALE_BITS:
                try:
                    found.append(Scheme(grid, group, zero, scale))  # type: ignore[arg-type]
                except SchemeError:
                    continue
    return found


def weight(N: int, K: int) -> Tensor:
    """Rows of zeros, of one sign, of tiny and of huge numbers among ordinary ones."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)) * 0.02
    for row, change in enumerate(
        (lambda x: x * 0, torch.abs, lambda x: -x.abs(), lambda x: x * 1e-6, lambda x: x * 1e4)
    ):
        w[row : row + 1] = change(w[row : row + 1]) if N > 1 else w[row : row + 1]
    return w


def rounding(scheme: Scheme, N: int, K: int, *, any_code: bool = False) -> QTensor:
    """A weight in that scheme; any_code: under the same scales, codes that no rounding need have chosen."""
    w = weight(N, K)
    q = codec.encode(w, codec.fit(w, scheme), scheme)
    if not any_code:
        return q
    low, high = codec.code_range(scheme)
    codes = torch.randint(low, high + 1, (N, K), generator=torch.Generator().manual_seed(K))
    return replace(q, codes=codes.to(codec.code_dtype(scheme)))


def layer_of(q: QTensor, **more: Any) -> Layer:
    return Layer(NAME, *q.codes.shape, q.scheme, **more)


def written(q: QTensor, *, inputs: Scales | None = None, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, as JSON would give it back, and the tensors of one module, which are those of the layout."""
    layer = layer_of(q, **more)
    assert NATIVE.adapt(layer, torch.bfloat16).scheme == q.scheme
    config, tensors = NATIVE.config([layer], ["lm_head"]), NATIVE.encode(q, layer, torch.bfloat16, inputs)
    assert _specs(tensors) == NATIVE.layout(layer, torch.bfloat16), str(q.scheme)
    return json.loads(json.dumps(config)), tensors


def _specs(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("grid", GRIDS)
def test_every_scheme_comes_back_bit_for_bit(grid: str) -> None:
    for i, scheme in enumerate(schemes(grid)):
        q = rounding(scheme, *SHAPES[i % len(SHAPES)], any_code=i % 2 == 1)
        config, tensors = written(q)
        assert same_bits(NATIVE.decode(config, NAME, tensors), codec.decode(q)), (str(scheme), q.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["int3-g64-asym", "q4_k", "q6_k", "q2_k", "nf4-g64-dq", "mxfp4", "nvfp4", "iq4nl-g32-sym-e8m0",
                                  "int5-g256-min-bf16", "fp8-channel", "ternary-tensor", "binary-g16-e8m0"])  # fmt: skip
def test_odd_shapes_come_back_bit_for_bit(text: str, shape: tuple[int, int]) -> None:
    for any_code in (False, True):
        q = rounding(Scheme.parse(text), *shape, any_code=any_code)
        assert same_bits(NATIVE.decode(*_module(q)), codec.decode(q))


def _module(q: QTensor) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    config, tensors = written(q)
    return config, NAME, tensors


def test_a_matrix_of_many_chunks_comes_back() -> None:
    q = rounding(Scheme.parse("int3-tensor-asym-f32"), 2100, 1000)
    assert same_bits(NATIVE.decode(*_module(q)), codec.decode(q))
    q = rounding(Scheme.parse("nf4-g64-dq"), 2100, 1000)
    assert same_bits(NATIVE.decode(*_module(q)), codec.decode(q))


def test_double_quantized_scales_that_hardly_differ_come_back() -> None:
    """Beside a large mean, many codes stand for the same float32: the writer must find one of them."""
    scheme = Scheme.parse("nf4-g16-dq")
    w = torch.ones(32, 256) + torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 1e-6
    q = codec.encode(w, codec.fit(w, scheme), scheme)
    assert 1 < len(q.scales.scale.unique()) < 100
    assert same_bits(NATIVE.decode(*_module(q)), codec.decode(q))


def test_scales_of_either_sign_come_back() -> None:
    """Descent may turn a scale's sign; one-level encodings and e4m3 hold it."""
    for text in ("int4-g32", "int4-g32-sym-f32", "nvfp4", "nf4-g64-dq"):
        q = rounding(Scheme.parse(text), 4, 256)
        s = q.scales
        turned = codec.snap(s.scale * torch.tensor([[1.0], [-1], [-1], [1]]), s.zero, q.scheme)
        q = replace(q, scales=turned)
        assert (turned.scale < 0).any() and same_bits(NATIVE.decode(*_module(q)), codec.decode(q))


@pytest.mark.parametrize(
    "text", ["mxfp4", "nvfp4", "int4-g32-sym-f32", "nf4-g64-dq", "q6_k", "int4-g32-min-k6", "fp8-channel"]
)
def test_scales_at_the_ends_of_their_encoding_come_back(text: str) -> None:
    """2^-127, which float32 holds only as a subnormal; f16's smallest numbers; large ones."""
    scheme = Scheme.parse(text)
    for sizes in ([2.0**-126, 2.0**-130, 2.0**-140, 1.0], [1e35, 1e36, 1e-38, 1.0], [1e-7, 1e-6, 3e-5, 1e-9]):
        w = torch.randn(4, 256, generator=torch.Generator().manual_seed(5)).clamp(-1, 1) * torch.tensor(sizes)[:, None]
        q = codec.encode(w, codec.fit(w, scheme), scheme)
        assert codec.decode(q).isfinite().all()
        assert same_bits(NATIVE.decode(*_module(q)), codec.decode(q)), sizes


def test_writing_changes_nothing() -> None:
    for text in ("q4_k", "nf4-g64-dq", "nvfp4", "mxfp4", "int3-g64-asym"):
        q, again = (rounding(Scheme.parse(text), 5, 352) for _ in range(2))
        config, tensors = written(q)
        copies = {name: t.clone() for name, t in tensors.items()}
        NATIVE.decode(config, NAME, tensors)
        assert torch.equal(q.codes, again.codes) and torch.equal(q.scales.scale, again.scales.scale)
        assert all(torch.equal(t.view(torch.uint8), copies[name].view(torch.uint8)) for name, t in tensors.items())


# ---------------------------------------------------------------------------------------------- the bytes, the promise


def number(words: list[int], bits: int, index: int) -> int:
    """One number of a stream of 32-bit words, lowest bit first, in Python's integers."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (stream >> (index * bits)) & ((1 << bits) - 1)


def test_the_layout_bit_by_bit() -> None:
    q = rounding(Scheme.parse("int3-g64-asym"), 5, 352)
    tensors = written(q)[1]
    assert tensors["weight_shape"].tolist() == [5, 352] and tensors["weight_codes"].shape == (5, 33)
    for n in range(5):
        row = tensors["weight_codes"][n].tolist()
        assert [number(row, 3, k) - 4 for k in range(352)] == q.codes[n].tolist()
    assert q.scales.zero is not None
    zeros = tensors["weight_zero_point"].tolist()
    assert len(zeros) == 3 and [number(zeros, 3, i) - 4 for i in range(30)] == q.scales.zero.flatten().tolist()
    assert torch.equal(tensors["weight_scale"], q.scales.scale.half())


def test_the_layout_of_two_levels_bit_by_bit() -> None:
    q = rounding(Scheme.parse("q4_k"), 3, 352)
    tensors, s = written(q)[1], q.scales
    for name, table, sign in (("weight_scale", s.scale, 1), ("weight_minimum", s.zero, -1)):
        assert table is not None and tensors[f"{name}_outer"].shape == (3, 2)
        words, outer = tensors[name].tolist(), tensors[f"{name}_outer"].float()
        for n in range(3):
            for g in range(11):
                assert sign * number(words, 6, n * 11 + g) * outer[n, g // 8] == table[n, g]
    q = rounding(Scheme.parse("q6_k"), 3, 352)  # symmetric: signed integers
    words, outer = written(q)[1]["weight_scale"].tolist(), written(q)[1]["weight_scale_outer"].float()
    assert all((number(words, 8, 22 + g) - 128) * outer[1, g // 16] == q.scales.scale[1, g] for g in range(22))


def test_the_layout_of_one_byte_scales() -> None:
    w = torch.tensor([[6.0] * 32, [0.75] * 32, [0.0] * 32])
    scheme = Scheme.parse("mxfp4")
    tensors = written(codec.encode(w, codec.fit(w, scheme), scheme))[1]
    assert tensors["weight_scale"].flatten().tolist() == [127, 124, 255]
    scheme = Scheme.parse("nvfp4")
    tensors = written(codec.encode(w, codec.fit(w, scheme), scheme))[1]
    assert tensors["weight_scale"].float()[:, 0].tolist() == [448, 56, 0] and tensors[
        "weight_scale_outer"
    ].tolist() == [448]
    scheme = Scheme.parse("fp8-channel")
    tensors = written(codec.encode(w, codec.fit(w, scheme), scheme))[1]
    assert tensors["weight_codes"].dtype == torch.float8_e4m3fn and tensors["weight_codes"][0, 0].float() == 448
    q = rounding(Scheme.parse("nf4-g16-dq"), 40, 352)
    tensors, absmax = written(q)[1], q.scales.outer
    assert absmax is not None and tensors["weight_scale_outer"].tolist() == absmax.flatten().tolist()
    each = absmax.flatten().repeat_interleave(256)[: 40 * 22].view(40, 22)
    decoded = codec.dynamic_map()[tensors["weight_scale"].long()] * each + tensors["weight_scale_mean"]
    assert torch.equal(decoded, q.scales.scale)


@pytest.mark.parametrize("shape", [(64, 4096), (63, 352), (5, 24)])
@pytest.mark.parametrize("grid", GRIDS)
def test_size_is_what_the_scheme_promises(grid: str, shape: tuple[int, int]) -> None:
    """But for rows of codes filled up to words, and a few numbers a tensor."""
    N, K = shape
    for scheme in schemes(grid):
        layout = NATIVE.layout(Layer(NAME, N, K, scheme), torch.bfloat16)
        bits = sum(8 * dtype.itemsize * torch.Size(extent).numel() for dtype, extent in layout.values())
        promised = N * K * scheme.bits_per_weight(K)
        padding = N * (-K * scheme.levels.bits % 32) if grid != "fp8" else 0
        assert -1e-6 <= bits - promised - padding < 128 + 3 * 32 + 2 * 32 + 64, scheme


def test_the_readers_tables_are_those_of_the_specifications() -> None:
    assert torch.equal(torch.from_numpy(dynamic_type()), codec.dynamic_map())
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    number_ = ~e4m3.isnan()
    assert torch.equal(torch.from_numpy(minifloat(4, 3, 7))[number_], e4m3[number_]) and number_.sum() == 254
    assert tuple(minifloat(2, 1, 1).tolist()) == GRIDS["fp4"].levels


# ------------------------------------------------------------------------------------------------ more than codes


def with_outliers(columns: list[int], text: str = "int4-g32", K: int = 96) -> QTensor:
    q = rounding(Scheme.parse(text), 5, K)
    kept = torch.randn(5, len(columns), generator=torch.Generator().manual_seed(1)).bfloat16()
    return replace(q, outliers=Outliers(torch.tensor(columns, dtype=torch.int64), kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outlier_columns_come_back_in_the_models_type(dtype: torch.dtype) -> None:
    q, plain = with_outliers([0, 17, 95]), rounding(Scheme.parse("int4-g32"), 5, 96)
    layer = layer_of(q, outliers=3)
    tensors = NATIVE.encode(q, layer, dtype)
    assert _specs(tensors) == NATIVE.layout(layer, dtype)
    assert tensors["outlier_columns"].dtype == torch.int32 and tensors["outlier_weight"].dtype == dtype
    assert torch.equal(tensors["weight_codes"], written(plain)[1]["weight_codes"])  # theirs are still there
    found = NATIVE.decode(NATIVE.config([layer], []), NAME, tensors)
    assert same_bits(found, codec.decode(q)) and not torch.equal(found, codec.decode(plain))


def test_a_matrix_may_turn_out_to_have_no_outliers() -> None:
    """The plan, and so the config, said there might be some; calibration found none."""
    planned = NATIVE.config([Layer(NAME, 5, 96, Scheme.parse("int4-g32"), outliers=1, rotate=32)], [])
    q = with_outliers([])
    tensors = NATIVE.encode(q, layer_of(q, rotate=32), torch.bfloat16)
    assert tensors["outlier_columns"].shape == (0,) and tensors["outlier_weight"].shape == (5, 0)
    assert same_bits(NATIVE.decode(planned, NAME, tensors), codec.decode(q))
    assert input_quantization(planned, tensors) is not None


def input_quantization(config: dict[str, Any], tensors: dict[str, Tensor]) -> InputQuantization | None:
    return NATIVE.input_quantization(config, NAME, tensors.get)


def test_inputs_that_nothing_is_done_to() -> None:
    assert input_quantization(*written(rounding(Scheme.parse("q4_k"), 5, 96))) is None
    assert input_quantization(*written(with_outliers([3]), outliers=1)) is None  # spared from what nobody rounds


def test_inputs_rounded_by_token() -> None:
    scheme = Scheme.parse("int8-token")
    assert input_quantization(
        *written(rounding(Scheme.parse("int8-channel"), 5, 96), activations=scheme)
    ) == InputQuantization(scheme)


@pytest.mark.parametrize("text", ["int8-tensor", "int8-tensor-asym", "fp8-tensor", "int8-tensor-asym-f32"])
def test_inputs_rounded_to_a_fixed_range(text: str) -> None:
    scheme, x = Scheme.parse(text), torch.randn(6, 96, generator=torch.Generator().manual_seed(2)) + 0.3
    scales = codec.fit(x * 1.1, scheme)
    q = rounding(Scheme.parse("int8-channel"), 5, 96)
    config, tensors = written(q, activations=scheme, inputs=scales)
    found = input_quantization(config, tensors)
    assert found is not None and found.scheme == scheme
    assert torch.equal(found(x), codec.rounded(x, scheme, scales)) and not torch.equal(
        found(x), codec.rounded(x, scheme)
    )


def test_inputs_rotated_and_in_part_spared() -> None:
    scheme = Scheme.parse("int8-token")
    config, tensors = written(with_outliers([3, 90]), outliers=2, rotate=32, activations=scheme)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(3))
    found, meant = input_quantization(config, tensors), InputQuantization(scheme, None, torch.tensor([3, 90]), 32)
    assert found is not None and torch.equal(found(x), meant(x))
    assert not torch.equal(found(x), InputQuantization(scheme, None, None, 32)(x))
    assert not torch.equal(found(x), InputQuantization(scheme, None, torch.tensor([3, 90]))(x))


def test_the_config_groups_what_is_alike_and_keeps_names_apart() -> None:
    int4, int8, token = Scheme.parse("int4-g32"), Scheme.parse("int8-channel"), Scheme.parse("int8-token")
    layers = [Layer("m.a", 5, 96, int4), Layer("m.b", 7, 64, int4), Layer("m.c", 5, 96, int8, activations=token)]
    layers += [Layer("m.d", 5, 96, int4, rotate=32), Layer("m.e", 5, 96, int4, outliers=2, transposed=True)]
    layers += [Layer("m.f", 5, 96, int4, outliers=3)]
    assert NATIVE.config(layers, ["lm_head"]) == {
        "quant_method": "bitwright",
        "format_version": 1,
        "modules": [
            {"scheme": "int4-g32", "modules": ["m.a", "m.b"]},
            {"scheme": "int8-channel", "activations": "int8-token", "modules": ["m.c"]},
            {"scheme": "int4-g32", "rotate": 32, "modules": ["m.d"]},
            {"scheme": "int4-g32", "outliers": True, "modules": ["m.e", "m.f"]},
        ],
    }


@pytest.mark.parametrize("name", [NAME, NAME.removeprefix("model."), f"base.{NAME}"])
def test_a_file_of_the_bare_model_lacks_its_prefix_or_adds_one(name: str) -> None:
    q = rounding(Scheme.parse("q4_k"), 5, 352)
    config, tensors = written(q)
    assert same_bits(NATIVE.decode(config, name, tensors), codec.decode(q))
    with pytest.raises(FormatError, match="0 times"):
        NATIVE.decode(config, name.removesuffix("up_proj"), tensors)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scheme": Scheme.parse("int8-token")}, "for inputs, not for weights"),
        ({"activations": Scheme.parse("int8-channel")}, "cannot be rounded to int8-channel"),
        ({"activations": Scheme.parse("int8-tensor-min")}, "cannot be rounded to int8-tensor-min"),
        ({"outliers": 97}, "97 of 96 input channels"),
        ({"outliers": -1}, "-1 of 96 input channels"),
        ({"rotate": 64}, "blocks of 64"),
        ({"rotate": 24}, "blocks of 24"),
        ({"rotate": -2}, "blocks of -2"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    layer = replace(Layer(NAME, 5, 96, Scheme.parse("int4-g32")), **change)
    with pytest.raises(FormatError, match=reason) as caught:
        NATIVE.adapt(layer, torch.bfloat16)
    assert caught.value.where == NAME and caught.value.remedy


def test_the_writer_wants_what_the_layer_promises() -> None:
    q = rounding(Scheme.parse("int8-channel"), 5, 96)
    with pytest.raises(FormatError, match="0 outlier columns, not the 2") as caught:
        NATIVE.encode(q, layer_of(q, outliers=2), torch.bfloat16)
    assert caught.value.where == NAME
    with pytest.raises(FormatError, match="1 outlier columns, not the 0"):
        NATIVE.encode(with_outliers([3]), layer_of(q), torch.bfloat16)
    with pytest.raises(FormatError, match="no range") as caught:
        NATIVE.encode(q, layer_of(q, activations=Scheme.parse("int8-tensor")), torch.bfloat16)
    assert caught.value.where == NAME and caught.value.remedy


def _entry(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["modules"][0].update(change)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no version": (lambda c: c.pop("format_version"), "format_version is None"),
    "newer": (lambda c: c.update(format_version=2), "format_version is 2"),
    "not a number": (lambda c: c.update(format_version=True), "format_version is True"),
    "no modules": (lambda c: c.pop("modules"), "no list of modules"),
    "modules a dict": (lambda c: c.update(modules={NAME: "q4_k"}), "no list of modules"),
    "entry a text": (lambda c: c["modules"].append("q4_k"), "no list of names"),
    "entry without names": (lambda c: c["modules"].append({"scheme": "q4_k"}), "no list of names"),
    "module missing": (_entry(modules=["other"]), "0 times, not once"),
    "module twice": (lambda c: c["modules"].append(c["modules"][0]), "2 times, not once"),
    "no scheme": (lambda c: c["modules"][0].pop("scheme"), "None is no scheme"),
    "unknown scheme": (_entry(scheme="int9-g32"), "'int9-g32' is no scheme: unknown grid"),
    "scheme of inputs": (_entry(scheme="int4-token"), "weights cannot be rounded"),
    "unknown inputs": (_entry(activations="int8"), "'int8' is no scheme"),
    "no inputs": (_entry(activations=None), "None is no scheme"),
    "grouped inputs": (_entry(activations="int8-g32"), "or inputs to int8-g32"),
    "outliers a number": (_entry(outliers=2), "outliers 2 or sparse False is not true or false"),
    "rotate a flag": (_entry(rotate=True), "rotate True no block"),
    "a newer key": (_entry(permuted=True), "not known here: permuted"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_wrong_names_the_module(case: str) -> None:
    change, reason = CONFIGS[case]
    config, tensors = written(rounding(Scheme.parse("q4_k"), 5, 352))
    change(config)
    for read in (
        lambda: NATIVE.decode(config, NAME, tensors),
        lambda: NATIVE.input_quantization(config, NAME, tensors.get),
    ):
        with pytest.raises(FormatError, match=reason) as caught:
            read()
        assert caught.value.where == NAME


def _set(name: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        changed = tensors[name].clone()
        changed.view(-1)[-1] = value
        tensors[name] = changed

    return change


def _become(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


NAN = float("nan")
FILES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "NaN scale": ("int4-g32", _set("weight_scale", NAN), "weight_scale holds NaN"),
    "infinite scale": ("int4-g32-sym-bf16", _set("weight_scale", float("inf")), "weight_scale holds NaN"),
    "NaN minimum": ("int4-g32-min", _set("weight_minimum", NAN), "weight_minimum holds NaN"),
    "NaN outer": ("q4_k", _set("weight_scale_outer", NAN), "weight_scale_outer holds NaN"),
    "NaN e4m3 scale": ("nvfp4", _set("weight_scale", NAN), "weight_scale holds NaN"),
    "divisor 0": ("nvfp4", _set("weight_scale_outer", 0.0), "weight_scale holds NaN"),
    "NaN mean": ("nf4-g64-dq", _set("weight_scale_mean", NAN), "weight_scale_mean holds NaN"),
    "overflow": ("fp8-channel", _set("weight_scale", 3e38), "decode to holds NaN or Inf"),
    "ternary −2": ("ternary-channel", _set("weight_codes", 0), "stands for nothing"),
    "scale of another type": ("int4-g32", _become("weight_scale", torch.ones(5, 11)), "weight_scale is torch.float32"),
    "shape of another type": ("q4_k", _become("weight_shape", torch.ones(2)), "weight_shape is torch.float32"),
    "codes of another type": (
        "fp8-channel",
        _become("weight_codes", torch.zeros(5, 352)),
        "weight_codes is torch.float32",
    ),
    "more columns": ("q4_k", _set("weight_shape", 360), "weight_codes is"),
    "fewer columns": ("q4_k", _set("weight_shape", 100), "weight_codes is"),
    "columns by the billion": ("q4_k", _set("weight_shape", 1 << 60), "weight_codes is"),
    "no columns": ("q4_k", _set("weight_shape", 0), "weight_shape says 5 × 0"),
    "no rows": ("q4_k", _become("weight_shape", torch.tensor([0, 352])), "weight_shape says 0 × 352"),
    "negative columns": ("q4_k", _set("weight_shape", -352), "weight_shape says 5 × -352"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_wrong_names_the_module(case: str) -> None:
    text, change, reason = FILES[case]
    config, tensors = written(rounding(Scheme.parse(text), 5, 352))
    change(tensors)
    with pytest.raises(FormatError, match=reason) as caught:
        NATIVE.decode(config, NAME, tensors)
    assert caught.value.where == NAME and caught.value.remedy


@pytest.mark.parametrize("columns", [[3, 96], [-1, 3], [4, 3], [3, 3], [96, 97], [-2, -1]])
def test_outlier_columns_out_of_place_are_an_error(columns: list[int]) -> None:
    config, tensors = written(with_outliers([3, 90]), outliers=2, activations=Scheme.parse("int8-token"))
    tensors["outlier_columns"] = torch.tensor(columns, dtype=torch.int32)
    for read in (lambda: NATIVE.decode(config, NAME, tensors), lambda: input_quantization(config, tensors)):
        with pytest.raises(FormatError, match=r"do not rise within 0\.\.95"):
            read()


def test_a_rotation_that_does_not_fit_is_an_error() -> None:
    config, tensors = written(rounding(Scheme.parse("int4-g32"), 5, 96), rotate=32)
    for block in (64, 3, -32):
        config["modules"][0]["rotate"] = block
        with pytest.raises(FormatError, match=f"blocks of {block}"):
            input_quantization(config, tensors)


@pytest.mark.parametrize(
    "text", ["q4_k", "q6_k", "nf4-g64-dq", "nvfp4", "mxfp4", "int3-g64-asym", "fp8-channel", "int4-g32-min"]
)
def test_no_tensor_can_be_left_out_or_cut(text: str) -> None:
    q = replace(rounding(Scheme.parse(text), 5, 352), outliers=Outliers(torch.tensor([1, 9]), torch.ones(5, 2)))
    scheme = Scheme.parse("int8-tensor-asym")
    ranged = codec.fit(torch.randn(3, 352), scheme)
    config, tensors = written(q, outliers=2, activations=scheme, inputs=ranged)
    for name, tensor in tensors.items():
        for wrong in ({}, {name: tensor[..., :-1]}, {name: tensor[None]}, {name: tensor[:0]}):
            have = {key: t for key, t in tensors.items() if key != name} | wrong
            with pytest.raises(FormatError, match=name.replace("columns", "")) as caught:  # k is what both say
                input_quantization(config, have) if name.startswith("input_") else NATIVE.decode(config, NAME, have)
            assert caught.value.where == NAME


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_module_decodes_or_is_an_error_that_names_it(data: st.DataObject) -> None:
    """Never another exception, never a number that is none."""
    text = data.draw(
        st.sampled_from(["q4_k", "nf4-g64-dq", "nvfp4", "mxfp4", "int3-g64-asym", "ternary-channel", "fp8-tensor"])
    )
    config, tensors = written(rounding(Scheme.parse(text), 3, 40))
    name = data.draw(st.sampled_from(sorted(tensors)))
    octets = tensors[name].clone().view(torch.uint8).flatten()
    for _ in range(data.draw(st.integers(1, 3))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    tensors[name] = octets.view(tensors[name].dtype).view(tensors[name].shape)
    try:
        found, where = NATIVE.decode(config, NAME, tensors), NAME
    except FormatError as error:
        found, where = torch.zeros(1), error.where
    assert found.isfinite().all() and where == NAME


# -------------------------------------------------------------------------------------------------------- directories


def directory(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    write_shard(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return folder


def test_a_directory_knows_its_modules(tmp_path: Path) -> None:
    fp8, q4_k = rounding(Scheme.parse("fp8-channel"), 5, 96), with_outliers([3], "q4_k")
    layers = [Layer("m.a", 5, 96, fp8.scheme), Layer("m.b", 5, 96, q4_k.scheme, outliers=1, rotate=32)]
    tensors: dict[str, Tensor] = {"m.norm.weight": torch.ones(96), "m.a.bias": torch.ones(5)}
    for q, layer in zip((fp8, q4_k), layers, strict=True):
        tensors |= {f"{layer.name}.{name}": t for name, t in NATIVE.encode(q, layer, torch.float32).items()}
    weight_source = WeightSource(directory(tmp_path, tensors, NATIVE.config(layers, [])))
    assert weight_source.format is NATIVE and list(weight_source.modules) == ["m.a", "m.b"]
    assert sorted(weight_source.plain) == ["m.a.bias", "m.norm.weight"]
    assert same_bits(weight_source.read("m.a.weight"), codec.decode(fp8))
    assert same_bits(weight_source.read("m.b.weight"), codec.decode(q4_k))
    found = weight_source.input_quantization("m.b.weight")
    assert found is not None and found.rotate == 32 and weight_source.input_quantization("m.a.weight") is None


def test_no_other_reader_takes_this_format_s_modules_for_its_own() -> None:
    for format_ in (f for f in FORMATS.values() if f.name != "gguf"):  # which is one file, not a directory
        for text in ("int4-g128", "int8-g32-asym", "fp8-channel"):
            with suppress(FormatError):
                layer = format_.adapt(Layer("x", 64, 256, Scheme.parse(text)), torch.float16)
                types = {name: dtype for name, (dtype, _) in format_.layout(layer, torch.float16).items()}
                integers, floats = (
                    {"awq", "gptq", "auto-round"},
                    {"compressed-tensors", "fp8", "fbgemm_fp8", "modelopt"},
                )  # quant_method tells those
                others = next((some for some in (integers, floats) if format_.name in some), set())
                assert {r.name for r in READERS if r.holds(types)} <= {format_.name, *others}, text
                assert types.keys() <= next(r for r in READERS if r.name == format_.name).parts


def test_a_damaged_directory_is_an_error(tmp_path: Path) -> None:
    q = rounding(Scheme.parse("q4_k"), 5, 96)
    config, tensors = written(q)
    named = {f"{NAME}.{name}": t for name, t in tensors.items() if name != "weight_minimum"}
    with pytest.raises(InputError, match="weight_minimum"):
        WeightSource(directory(tmp_path, named, config)).read(f"{NAME}.weight")
    with pytest.raises(CheckpointError, match="not read here"):
        WeightSource(directory(tmp_path, named, {"quant_method": "other"}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_quantized_verified_and_judged(family: str, text: str, tmp_path: Path) -> None:
    """gpt2: Conv1D, and a checkpoint whose names lack the model's prefix."""
    source = make_checkpoint(tmp_path / "source", family)
    if family == "gpt2":
        checkpoint = Checkpoint(source)
        bare = {n.removeprefix("transformer."): checkpoint.read(n) for n in checkpoint.tensors if n != "lm_head.weight"}
        write_shard(source / "model.safetensors", bare)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.0.*"\nscheme = "nf4-g64-dq"\n')
    result = bitwright.quantize(
        source, tmp_path / "out", format="bitwright", scheme="q4_k", method="rtn", recipe=recipe
    )
    assert not result.fallbacks
    weight_source, ledger = WeightSource(tmp_path / "out"), from_jsonl(tmp_path / "out" / "ledger.jsonl")
    quantized = {entry.name: entry for entry in ledger if entry.scheme}
    assert {name.removesuffix(".weight") for name in quantized} == set(weight_source.modules)
    assert {entry.scheme for entry in quantized.values()} == {"q4_k", "nf4-g64-dq"}
    judged = bitwright.evaluate(tmp_path / "out", text=text, reference=source, seqlen=32)
    assert judged.kl_mean is not None and 0 < judged.kl_mean < 1
