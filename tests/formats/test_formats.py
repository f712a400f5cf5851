"""File formats: the bytes are those of the specification and of the format's own library, and read back as meant."""

import json

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from bitwright.errors import FormatError
from bitwright.formats import FORMATS, Layer
from bitwright.numerics.codec import decode, encode, fit
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme

CT, GPTQ = FORMATS["compressed-tensors"], FORMATS["gptq"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HELD = {
    "compressed-tensors": ("int4-g128", "int4-g32-asym", "int3-g128-asym", "int2-g64", "int5-g32-asym", "int7-channel",
                           "int8-channel", "int8-channel-asym", "int8-tensor", "ternary-channel", "fp8-channel", "fp8-tensor",
                           "mxfp4", "nvfp4"),
    "awq": ("int4-g128-asym", "int4-g32", "int4-channel-asym", "int4-g16-asym1"),
    "bitsandbytes": ("nf4-g64-dq", "nf4-g32", "nf4-g128-bf16", "nf4-g256-dq"),
    "gptq": ("int4-g128", "int4-g128-asym", "int3-g64-asym", "int3-channel", "int2-g64", "int8-channel", "int8-g32-asym"),
}  # fmt: skip


def weight(N: int = 64, K: int = 256) -> torch.Tensor:
    g = torch.Generator().manual_seed(N + K)
    w = torch.randn(N, K, generator=g) * 0.02
    w[0] = 0
    w[1] = w[1].abs() + 0.01  # zero points at the ends
    w[2] = -w[2].abs() - 0.01
    return w


def stored(name: str, text: str, dtype: torch.dtype) -> tuple[Layer, QTensor]:
    layer = FORMATS[name].adapt(Layer("a.b", 64, 256, Scheme.parse(text)), dtype)
    return layer, encode(weight(), fit(weight(), layer.scheme), layer.scheme)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HELD.items() for text in texts])
def test_what_is_written_is_what_was_planned_and_meant(name: str, text: str, dtype: torch.dtype) -> None:
    format_ = FORMATS[name]
    layer, q = stored(name, text, dtype)
    tensors = format_.encode(q, layer, dtype)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == format_.layout(layer, dtype)
    found = format_.decode(format_.config([layer], ["lm_head"]), "a.b", tensors)
    assert torch.equal(found, decode(q).to(found.dtype))


@pytest.mark.parametrize("text", ["int4-g32", "int4-g32-asym", "int3-g64-asym", "int8-channel", "mxfp4", "nvfp4"])
def test_the_librarys_own_compressor_writes_the_same_bytes(text: str) -> None:
    layer, q = stored("compressed-tensors", text, torch.float32)
    mine = CT.encode(q, layer, torch.float32)
    group = CT.config([layer], [])["config_groups"]["group_0"]
    state = {"weight": decode(q), "weight_scale": q.scales.scale.clone()}
    if q.scales.zero is not None:
        state["weight_zero_point"] = q.scales.zero.to(torch.int8)
    if text == "nvfp4" and q.scales.outer is not None:
        state["weight_scale"] = q.scales.scale * q.scales.outer
        state["weight_global_scale"] = q.scales.outer.reshape(1)
    if text in ("mxfp4", "nvfp4"):
        state["weight_scale"][state["weight_scale"] == 0] = 2.0**-127 if text == "mxfp4" else 0.0
    theirs = BaseCompressor.get_value_from_registry(group["format"]).compress(state, QuantizationScheme(**group))
    some = slice(1, None)  # row 0 is all zeros: the sign of zero is free
    assert torch.equal(mine["weight_packed"][some], theirs["weight_packed"][some])
    if q.scales.zero is not None:
        assert torch.equal(mine["weight_zero_point"], theirs["weight_zero_point"])


@pytest.mark.parametrize("text", ["int4-g128-asym", "int3-g64-asym", "int2-g64", "int8-channel"])
def test_gptq_bit_by_bit(text: str) -> None:
    """Every code lies at bit k·b of its column, every zero point at bit n·b of its group, lowest bit first: less 1 in
    version 1, which symmetric files are."""
    layer, q = stored("gptq", text, torch.float16)
    version = GPTQ.config([layer], [])["checkpoint_format"]
    assert version == ("gptq_v2" if text.endswith("asym") else "gptq")
    tensors, bits, half = GPTQ.encode(q, layer, torch.float16), q.scheme.levels.bits, 1 << (q.scheme.levels.bits - 1)

    def field(words: list[int], index: int) -> int:
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return (stream >> (index * bits)) & ((1 << bits) - 1)

    for n in (0, 1, 2, 63):
        column = tensors["qweight"][:, n].tolist()
        assert [field(column, k) for k in range(256)] == [int(c) + half for c in q.codes[n]]
    for g in range(layer.scheme.groups(256)):
        row = tensors["qzeros"][g].tolist()
        zeros = [0] * 64 if q.scales.zero is None else q.scales.zero[:, g].int().tolist()
        least = 1 if version == "gptq" else 0
        assert [field(row, n) + least for n in range(64)] == [zero + half for zero in zeros]
    assert tensors["g_idx"].tolist() == [k // layer.scheme.group_length(256) for k in range(256)]
    assert torch.equal(tensors["scales"].float(), q.scales.scale.T)


def test_awq_number_by_number() -> None:
    """AutoAWQ packs outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight into a word, the first in its lowest four bits."""
    layer, q = stored("awq", "int4-g32-asym", torch.float16)
    assert q.scales.zero is not None
    tensors, order = FORMATS["awq"].encode(q, layer, torch.float16), (0, 2, 4, 6, 1, 3, 5, 7)
    for name, numbers in (("qweight", q.codes.T), ("qzeros", q.scales.zero.T)):
        for row in (0, 1, 7):
            found = [tensors[name][row, n // 8].item() >> 4 * order.index(n % 8) & 15 for n in range(64)]
            assert found == [int(number) + 8 for number in numbers[row]]
    assert torch.equal(tensors["scales"].float(), q.scales.scale.T)


def test_bitsandbytes_number_by_number() -> None:
    """The first of two codes in the high half; scales by bitsandbytes' own formula: map[index] · absmax of 256 + offset."""
    layer, q = stored("bitsandbytes", "nf4-g64-dq", torch.bfloat16)
    t = FORMATS["bitsandbytes"].encode(q, layer, torch.bfloat16)
    octets = t["weight"][:, 0].tolist()
    assert [
        octets[i // 2] >> (4 if i % 2 == 0 else 0) & 15 for i in range(q.codes.numel())
    ] == q.codes.flatten().tolist()
    state = json.loads(bytes(t["weight.quant_state.bitsandbytes__nf4"].tolist()))
    offset = state.pop("nested_offset")
    assert state == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 256],
        "nested_blocksize": 256, "nested_dtype": "float32",
    }  # fmt: skip
    index, absmax = t["weight.absmax"].long(), t["weight.nested_absmax"]
    scale = t["weight.nested_quant_map"][index] * absmax[torch.arange(len(index)) // 256] + torch.tensor(offset)
    assert torch.equal(scale, q.scales.scale.flatten())


def test_gptq_holds_every_zero_point() -> None:
    """The lowest code too, which version 1 has no place for."""
    w = torch.rand(32, 128) + 0.5
    layer = GPTQ.adapt(Layer("x", 32, 128, Scheme.parse("int4-g128-asym")), torch.float16)
    q = encode(w, fit(w, layer.scheme), layer.scheme)
    assert q.scales.zero is not None and (q.scales.zero == -8).all()
    tensors = GPTQ.encode(q, layer, torch.float16)
    assert torch.equal(GPTQ.decode(GPTQ.config([layer], []), "x", tensors), decode(q))


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("compressed-tensors", Layer("x", 64, 352, Scheme.parse("int4-g128")), "not a multiple"),
        ("compressed-tensors", Layer("x", 64, 256, Scheme.parse("int4-g128"), transposed=True), "Conv1D"),
        ("compressed-tensors", Layer("x", 64, 256, Scheme.parse("nf4-g64")), "no container"),
        ("compressed-tensors", Layer("x", 64, 256, Scheme.parse("int4-g32-min")), "no container"),
        ("compressed-tensors", Layer("x", 64, 256, Scheme.parse("fp8-g128")), "no container"),
        ("awq", Layer("x", 64, 256, Scheme.parse("int3-g128")), "cannot hold"),
        ("awq", Layer("x", 64, 256, Scheme.parse("int4-tensor")), "cannot hold"),
        ("awq", Layer("x", 60, 256, Scheme.parse("int4-g128")), "whole 32-bit words"),
        ("awq", Layer("x", 64, 256, Scheme.parse("int4-g128"), transposed=True), "Conv1D"),
        ("awq", Layer("x", 64, 256, Scheme.parse("int4-g128"), activations=Scheme.parse("int8-token")), "inputs are"),
        ("bitsandbytes", Layer("x", 64, 256, Scheme.parse("int4-g64")), "cannot hold"),
        ("bitsandbytes", Layer("x", 64, 256, Scheme.parse("nf4-g16")), "cannot hold"),
        ("bitsandbytes", Layer("x", 64, 256, Scheme.parse("nf4-g64"), rotate=32), "rotation"),
        ("bitsandbytes", Layer("x", 64, 352, Scheme.parse("nf4-g64")), "not a multiple"),
        ("gptq", Layer("x", 64, 352, Scheme.parse("int4-g128")), "not a multiple"),
        ("gptq", Layer("x", 64, 256, Scheme.parse("int6-g128")), "cannot hold"),
        ("gptq", Layer("x", 64, 256, Scheme.parse("int4-tensor")), "cannot hold"),
        ("gptq", Layer("x", 63, 256, Scheme.parse("int4-g128")), "whole 32-bit words"),
    ],
)
def test_refusals_name_layer_reason_and_remedy(name: str, layer: Layer, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        FORMATS[name].adapt(layer, torch.bfloat16)
    assert caught.value.where == "x" and caught.value.remedy


def test_a_group_that_does_not_divide_k_is_answered_by_one_that_does() -> None:
    with pytest.raises(FormatError) as caught:
        CT.adapt(Layer("x", 64, 576, Scheme.parse("int4-g128-asym")), torch.bfloat16)
    assert "--scheme int4-g64-asym" in caught.value.remedy


def test_an_awq_file_holds_one_group() -> None:
    layers = [Layer(n, 64, 256, Scheme.parse(t)) for n, t in (("a", "int4-g128"), ("b", "int4-g64-asym"))]
    with pytest.raises(FormatError, match="one group"):
        FORMATS["awq"].config(layers, [])


def test_a_gptq_file_holds_one_scheme() -> None:
    layers = [Layer(n, 64, 256, Scheme.parse(t)) for n, t in (("a", "int4-g128"), ("b", "int8-g128"))]
    with pytest.raises(FormatError, match="one scheme"):
        GPTQ.config(layers, [])
