"""GGUF: bytes by the gguf package's reader, hostile files, tokenizers, and the main job from end to end."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bench.gguf_families import small_config
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel
from typer.testing import CliRunner

from bitwright.calibration.windows import load_tokenizer
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError, InputError
from bitwright.formats import FORMATS, Layer
from bitwright.formats.ggml import TYPES, encode
from bitwright.formats.ggml_codes import codes_of
from bitwright.formats.ggml_scales import READ_ONLY
from bitwright.formats.gguf import kind_of
from bitwright.gguf import rope
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.gguf.config_keys import WINDOWLESS, config_of, keys_of
from bitwright.gguf.file_types import MIXES, Place, type_in
from bitwright.gguf.fixed_keys import ALIKE, EVERY
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tensor_names import Names
from bitwright.methods.gptq import gptq
from bitwright.methods.search import search
from bitwright.models.experts import one_by_one
from bitwright.models.families import model_of, positions_of
from bitwright.models.gguf_source import GgufWeightSource, read_tokenizer
from bitwright.numerics.codec import code_range, decode, per_column
from bitwright.numerics.lattice import nearest
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.ledger import from_jsonl
from conftest import ENCODERS, FAMILIES, carry_keys, make_checkpoint, random_blocks

GGUF = FORMATS["gguf"]
PEER_READS = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "starcoder2", "gemma2")


def weight(N: int, K: int, seed: int = 0) -> Tensor:
    """Rows of zeros, of nearly nothing, of much, of one sign, and one with an empty super-block."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.03
    w[0], w[1], w[2], w[3] = 0, w[1] * 1e-4, w[2] * 100, w[3].abs()
    w[4, :256] = 0
    return w


# -------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", TYPES)
def test_the_gguf_package_reads_what_was_meant(name: str) -> None:
    kind = TYPES[name]
    known = getattr(gguf.GGMLQuantizationType, name, None)
    assert known is None or gguf.GGML_QUANT_SIZES[known] == (kind.size, kind.bytes)
    for seed in range(3):
        q = search(weight(9, 768, seed), None, kind.scheme).q
        for any_code in (q, scrambled(q)):
            blocks = encode(any_code, kind)
            assert torch.equal(torch.from_numpy(read(name, blocks.numpy())), decode(any_code))
            assert torch.equal(codes_of(name, blocks), any_code.codes)  # our own reader of what lies in them


@pytest.mark.parametrize("name", TYPES)
def test_a_changed_bit_is_seen(name: str) -> None:
    """By the reader that checks what is written: in codes, scales or minima, wherever it is not without meaning."""
    kind = TYPES[name]
    q = search(weight(9, 512)[5:], None, kind.scheme).q
    layer = Layer("a", 4, 512, kind.scheme, container=name)
    blocks = GGUF.encode(q, layer, torch.float32)["weight"]
    config = GGUF.config([layer], [])
    assert GGUF.wrong(config, "a", {"weight": blocks}, q) == 0
    for at in range(kind.bytes):
        changed = blocks.clone()
        changed[2, at] ^= 1 << at % 8
        meant = torch.equal(GGUF.decode(config, "a", {"weight": changed}), GGUF.decode(config, "a", {"weight": blocks}))
        assert (GGUF.wrong(config, "a", {"weight": changed}, q) == 0) == meant, at


def scrambled(q: QTensor) -> QTensor:
    """Codes that no rounding need have chosen, under the same scales."""
    if q.scheme.levels.run > 1:
        entries = nearest(3 * torch.randn(q.codes.shape, generator=torch.Generator().manual_seed(1)), q.scheme.grid)
        return replace(q, codes=entries)
    lo, hi = code_range(q.scheme)
    codes = torch.randint(lo, hi + 1, q.codes.shape, generator=torch.Generator().manual_seed(1)).to(q.codes.dtype)
    if q.scheme.scale == "e8m0":  # which has no zero: groups of zeros keep their codes
        empty = per_column(q.scales.scale == 0, q.scheme, q.codes.shape[1])
        codes = torch.where(empty, q.codes, codes)
    return QTensor(codes, q.scales, q.scheme, q.shape)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q4_0", "IQ4_XS", "MXFP4", "IQ1_S", "IQ3_XXS"])
def test_gptq_into_blocks_is_read_back_as_meant(name: str) -> None:
    kind = TYPES[name]
    x = torch.randn(900, 512, generator=torch.Generator().manual_seed(3))
    x = x @ (torch.eye(512) + 0.1 * torch.randn(512, 512, generator=torch.Generator().manual_seed(4)))
    q = gptq(weight(16, 512), x.T @ x / len(x), kind.scheme).q
    found = torch.from_numpy(dequantize(encode(q, kind).numpy(), getattr(gguf.GGMLQuantizationType, name)))
    assert torch.equal(found, decode(q))


def signs(blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Q1_0 weight by weight, as its struct in ggml-common.h says."""
    weights = []
    for block in blocks.reshape(-1, 18):
        d = struct.unpack("<e", block[:2].tobytes())[0]
        weights += [d if block[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]
    return np.array(weights, np.float32).reshape(len(blocks), -1)


def two_bits(blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Q2_0 weight by weight, as `dequantize_row_q2_0` in ggml-quants.c says."""
    weights = []
    for block in blocks.reshape(-1, 18):
        d = struct.unpack("<e", block[:2].tobytes())[0]
        weights += [((block[2 + j // 4] >> 2 * (j % 4) & 3) - 1.0) * d for j in range(64)]
    return np.array(weights, np.float32).reshape(len(blocks), -1)


def read(name: str, blocks: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The gguf package's numbers, and those of two types that it does not decode."""
    known = {"Q1_0": signs, "Q2_0": two_bits}
    if name in known:
        return known[name](blocks)
    found: np.ndarray[Any, np.dtype[np.float32]] = dequantize(blocks, gguf.GGMLQuantizationType[name])
    return found


IN_RUNS = [name for name, kind in TYPES.items() if kind.scheme.levels.run > 1]


@pytest.mark.parametrize("name", [*READ_ONLY, "Q1_0", *IN_RUNS])
def test_lattices_are_codes_under_scales(name: str) -> None:
    """Whatever lies in a block of others' files: the numbers of the gguf package."""
    for seed in range(3):
        blocks = random_blocks(name, 9, 768, seed)
        q = GGUF.quantized({"types": {"a": name}}, "a", {"weight": torch.from_numpy(blocks)})
        scheme = Scheme.parse(READ_ONLY[name]) if name in READ_ONLY else TYPES[name].scheme
        assert torch.equal(decode(q), torch.from_numpy(read(name, blocks))) and q.scheme == scheme
        assert len(q.codes.unique()) == len(set(q.scheme.levels.levels or ()))  # each level is taken


def test_blocks_that_are_no_codes_under_scales_are_refused() -> None:
    blocks = random_blocks("NVFP4", 2, 128)
    blocks[1, 0] = 0xFF  # a scale with a sign
    for kind, says in [("NVFP4", "not codes under its scales"), ("Q8_1", "blocks of type Q8_1 are not read")]:
        with pytest.raises(FormatError, match=says):
            GGUF.quantized({"types": {"a": kind}}, "a", {"weight": torch.from_numpy(blocks)})


def test_rows_that_do_not_fill_blocks_get_llamacpp_s_fallback() -> None:
    for asked, K, got in [("Q4_K", 352, "Q5_0"), ("Q2_K", 128, "Q4_0"), ("Q6_K", 32, "Q8_0"), ("IQ4_XS", 96, "IQ4_NL")]:
        layer = GGUF.adapt(Layer("a.b", 8, K, TYPES[asked].scheme), torch.bfloat16)
        assert kind_of(layer).name == got and layer.scheme == TYPES[got].scheme
        assert f"{asked} -> {got}" in layer.fallback and f"rows of {K}" in layer.fallback
    assert GGUF.adapt(Layer("a.b", 8, 512, TYPES["Q4_K"].scheme), torch.bfloat16).fallback == ""
    with pytest.raises(FormatError, match="K = 40 is not a multiple of 32"):
        GGUF.adapt(Layer("a.b", 8, 40, TYPES["Q4_K"].scheme), torch.bfloat16)
    with pytest.raises(FormatError, match="no block type for int4-g128"):
        GGUF.adapt(Layer("a.b", 8, 256, Scheme.parse("int4-g128")), torch.bfloat16)
    raw = Layer("a.b", 8, 256, TYPES["Q4_K"].scheme, activations=Scheme.parse("int8-token"))
    with pytest.raises(FormatError, match="inputs are rounded"):
        GGUF.adapt(raw, torch.bfloat16)


def test_mixes_follow_the_published_rule() -> None:
    """By hand from llama-quant.cpp, for 16 blocks of 4 query heads to a key head, untied, with an importance matrix."""

    def types(mix: str, part: str, heads: int = 2, **more: Any) -> str:
        found = [type_in(mix, Place(part, i, 16, heads, False, True, **more)) for i in range(16)]
        return " ".join(found)

    assert types("Q4_K_M", "ffn_down").split() == [
        "Q6_K" if i in (0, 1, 4, 7, 10, 13, 14, 15) else "Q4_K" for i in range(16)
    ]
    assert types("Q4_K_M", "attn_v") == types("Q4_K_M", "ffn_down")
    assert types("Q4_K_S", "attn_v").split() == ["Q5_K"] * 4 + ["Q4_K"] * 12
    assert types("Q3_K_M", "ffn_down").split() == ["Q5_K"] + ["Q4_K"] * 15
    assert set(types("Q2_K", "attn_v").split()) == {"Q3_K"} and set(types("Q2_K", "attn_v", 4).split()) == {"Q4_K"}
    assert types("Q4_0", "ffn_down").split() == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert {type_in(mix, Place("output", 0, 16, 2, False, True)) for mix in MIXES} == {"Q5_K", "Q6_K", "Q8_0"}
    assert type_in("Q4_K_M", Place("token_embd", 0, 16, 2, True, True)) == "Q6_K"
    assert type_in("Q4_K_M", Place("token_embd", 0, 16, 2, False, True)) == "Q4_K"
    assert type_in("Q4_K_M", Place("output", 0, 16, 2, False, True, False)) == "Q8_0"


# ----------------------------------------------------------------------------------------------------------- container


def small_file(path: Path) -> Path:
    """A file with a key of each kind and three tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 3)
    writer.add_array("a.list", ["x", "yy", ""])
    writer.add_array("a.numbers", [1.5, 2.5])
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "ü")
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.ones(5, np.float16))
    blocks = encode(search(weight(5, 256), None, TYPES["Q4_K"].scheme).q, TYPES["Q4_K"]).numpy()
    writer.add_tensor("three", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_the_gguf_package_is_read_alike(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    mine, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert set(mine.tensors) == {"one", "two", "three"}
    for t in theirs.tensors:
        assert mine.raw(t.name).tobytes() == t.data.tobytes()
        assert mine.tensors[t.name].offset == t.data_offset
    assert mine.keys["a.list"] == ["x", "yy", ""] and mine.keys["a.flag"] is True and mine.keys["a.text"] == "ü"
    assert mine.keys["a.numbers"].tolist() == [1.5, 2.5] and mine.keys["a.count"] == 3
    assert torch.equal(mine.read("one"), torch.arange(6.0).view(2, 3)) and mine.read("two").dtype == torch.float16
    three = next(t for t in theirs.tensors if t.name == "three")
    assert torch.equal(mine.read("three"), torch.from_numpy(dequantize(three.data, three.tensor_type)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    file = GgufFile(tmp_path / "a.gguf")
    end = max(t.offset + t.nbytes for t in file.tensors.values())  # padding follows
    for length in [*range(0, 400), *range(400, end, 37), end - 1]:
        cut.write_bytes(whole[: min(length, end - 1)])
        with pytest.raises(CheckpointError):
            GgufFile(cut)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_file_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    """Never a crash, a hang, or more memory than the file has bytes: anything else than CheckpointError fails."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = small_file(Path(folder, "a.gguf"))
        content = bytearray(path.read_bytes())
        header = min(len(content), 700)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, header - 9))
            kind = data.draw(st.sampled_from(["byte", "count", "type"]))
            if kind == "byte":
                content[at] = data.draw(st.integers(0, 255))
            elif kind == "count":
                content[at : at + 8] = struct.pack(
                    "<Q", data.draw(st.sampled_from([0, 2**63, 2**64 - 1, 10**9, 2**32]))
                )
            else:
                content[at : at + 4] = struct.pack("<I", data.draw(st.integers(0, 60)))
        path.write_bytes(content)
        try:
            file = GgufFile(path)
            for name in file.tensors:
                file.raw(name)
        except CheckpointError:
            pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: b"GGML" + c[4:], "first four bytes"),
        (lambda c: c[:4] + struct.pack("<I", 9) + c[8:], "version 9"),
        (lambda c: c[:8] + struct.pack("<Q", 2**60) + c[16:], "no room for them"),
        (lambda c: c[:16] + struct.pack("<Q", 2**60) + c[24:], "no room for them"),
        (lambda c: c.replace(b"\x03\x00\x00\x00\x00\x00\x00\x00two", b"\x03\x00\x00\x00\x00\x00\x00\x00one"), "twice"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Any, says: str) -> None:
    path = small_file(tmp_path / "a.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=says):
        GgufFile(path)


def moved(path: Path, name: bytes, offset: int) -> None:
    """Give a tensor another offset."""
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    axes = struct.unpack_from("<I", content, at)[0]
    struct.pack_into("<Q", content, at + 4 + 8 * axes + 4, offset)
    path.write_bytes(content)


def test_misplaced_tensors_are_refused(tmp_path: Path) -> None:
    for offset, says in ((0, "misplaced or in"), (1 << 40, "the file at"), (33, "misplaced")):
        path = small_file(tmp_path / f"{offset}.gguf")
        moved(path, b"two", offset)
        with pytest.raises(CheckpointError, match=says):
            GgufFile(path)


# ---------------------------------------------------------------------------------------------- configs and tokenizers


def encoder_config(kind: str) -> Any:
    from transformers import AutoConfig

    values: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    if kind != "distilbert":
        values |= {"intermediate_size": 96, "max_position_embeddings": 128}
    return AutoConfig.for_model(kind, **values, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def stored_shapes(model: nn.Module, names: Names) -> dict[str, list[tuple[int, ...]]]:
    """Of each parameter that a file has, the shapes of the tensors that it lies in."""
    known = {k: names.own_shape(k, tuple(v.shape)) for k, v in model.state_dict().items() if names.has(k)}
    return {k: [place.shape for place in names.places(k, shape)] for k, shape in known.items()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_configs_survive_the_way_there_and_back(kind: str) -> None:
    config = (
        encoder_config(kind) if kind in ENCODERS else small_config(kind, num_hidden_layers=6 if kind in EVERY else 4)
    )
    with torch.device("meta"):
        model = model_of(config)
        one_by_one(model)
    names = Names(config)
    shapes, firsts = dict[str, tuple[int, ...]](), set[tuple[str, int]]()
    for parameter, tensor in model.state_dict().items():
        tied = config.tie_word_embeddings and parameter == "lm_head.weight"
        for place in () if tied else names.places(parameter, names.own_shape(parameter, tuple(tensor.shape))):
            assert (place.name, place.first) not in firsts
            firsts.add((place.name, place.first))
            shapes[place.name] = place.shape
    back = config_of(keys_of(config) | {"general.architecture": names.row.name}, shapes, "x")
    assert back.model_type == {"mistral": "llama", "roberta": "bert", "xlm-roberta": "bert"}.get(kind, kind)
    with torch.device("meta"):
        other = model_of(back)
        one_by_one(other)
    assert stored_shapes(other, Names(back)) == stored_shapes(model, names)
    turned = {key: value for key, value in keys_of(config).items() if ".rope." in key}
    there = {key: value for key, value in keys_of(back).items() if ".rope." in key}
    assert turned.keys() == there.keys()
    assert all(turned[key] == pytest.approx(there[key]) for key in turned)
    kept = (
        "rms_norm_eps layer_norm_epsilon layer_norm_eps sliding_window max_position_embeddings hidden_act layer_types"
    )
    for name in (*kept.split(), "query_pre_attn_scalar", "type_vocab_size"):
        if name in ("sliding_window", "layer_types") and kind in WINDOWLESS:
            continue  # llama.cpp does without
        if hasattr(config, name) and hasattr(back, name):
            meant = positions_of(config) if name == "max_position_embeddings" else getattr(config, name)
            meant = ALIKE.get(meant, meant) if name == "hidden_act" else meant
            assert getattr(back, name) == meant, name


def test_rows_are_turned_and_turned_back() -> None:
    """llama.cpp's order of a head of 4: 0, 2, 1, 3, so that a rotary pair (i, i + 2) lies side by side."""
    names = Names(small_config("llama"))
    order = names.rows("model.layers.0.self_attn.k_proj.weight", 8)
    assert order is not None and order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    w = torch.randn(64, 64)
    for parameter in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(names.read(parameter, names.written(parameter, w), (64, 64)), w)
    shifted = Names(small_config("gemma"))
    assert torch.equal(shifted.written("model.norm.weight", torch.zeros(3)), torch.ones(3))


def test_llama3_s_factors() -> None:
    """The bounds of its rule: short waves as they were, long ones divided by the factor."""
    config = small_config("llama")
    assert rope.tensors_of(config) == {}
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config.head_dim = 128
    factors = rope.tensors_of(config)[rope.FACTORS]
    assert factors[0] == 1 and factors[-1] == 32 and bool((factors.diff() >= 0).all())
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.allclose(ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0], plain / factors, rtol=1e-5)


@pytest.mark.parametrize("change", ["model", "pre_tokenizer", "vocabulary"])
def test_tokenizers_that_cannot_be_written_are_refused(change: str, tmp_path: Path, llama: Path) -> None:
    tiny_copy = shutil.copytree(llama, tmp_path / "copy")
    file = tiny_copy / "tokenizer.json"
    content = json.loads(file.read_text())
    if change == "model":
        content["model"]["type"] = "WordPiece"
    elif change == "pre_tokenizer":
        content["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": "[a-z]+"},
            "behavior": "Isolated",
            "invert": False,
        }
    else:
        content["added_tokens"].append({"id": 10**6, "content": "<far>", "special": True})
    from bitwright.gguf.tokenizer_keys import keys_of as vocabulary_keys

    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"type 'WordPiece'|unknown pre-tokenizer|an id 1000000"):
        vocabulary_keys(tiny_copy, load_tokenizer(tiny_copy) if change == "pre_tokenizer" else None, 5000)


# ---------------------------------------------------------------------------------------------------------- end to end


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code in (0, 1), done.output
    return json.loads(done.stdout) | {"exit": done.exit_code}


@pytest.mark.parametrize(
    "kind", [kind for kind in ARCHITECTURES if kind in (*FAMILIES, *ENCODERS) and kind != "gpt_neox"]
)
def test_every_architecture_as_transformers_reads_the_file(kind: str, tmp_path: Path, text: str) -> None:
    """The same logits from our reader and from transformers' own, which dequantizes by the gguf package."""
    from transformers import AutoModel, AutoModelForCausalLM

    from bitwright.models.streamed import StreamedModel

    source = make_checkpoint(tmp_path / "source", kind)
    out = tmp_path / "a.gguf"
    how = ["--scheme", "q8_0", "--calib", text, "--seqlen", "32", "--samples", "4"]
    planned = run("quantize", str(source), str(out), *how, "--dry-run")["bytes"]
    found = run("quantize", str(source), str(out), *how)
    assert found["fallbacks"] == [] and planned == found["bytes"] == out.stat().st_size
    streamed, ids = StreamedModel(out), torch.arange(48)[None] * 5 % 257
    streamed.load(streamed.skeleton.outer_names())
    causal = ARCHITECTURES[kind].causal
    hidden = list(streamed.hidden(ids))
    mine = torch.cat([streamed.skeleton.head(h) for h in hidden] if causal else hidden)
    maker = AutoModelForCausalLM if causal else AutoModel
    float_model = maker.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        original = float_model(ids).logits if causal else float_model(ids).last_hidden_state
    assert (mine - original).abs().max() < 0.05 * original.abs().max() + 0.02
    if kind in PEER_READS:
        config = float_model.config  # it does not read all keys of one
        peer = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="a.gguf", config=config, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            assert torch.allclose(peer(ids).logits, mine, atol=2e-4)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_main_job(tmp_path: Path, method: str) -> None:
    from bitwright.cli.demo import MODEL

    out = tmp_path / "a.gguf"
    how = ["--scheme", "q4_k_m", "--method", method, "--samples", "8", "--seqlen", "64"]
    planned = run("quantize", str(MODEL), str(out), *how, "--dry-run")["bytes"]
    found = run("quantize", str(MODEL), str(out), *how)
    assert planned == out.stat().st_size
    ledger = {entry.name: entry for entry in from_jsonl(tmp_path / "a.ledger.jsonl")}
    assert found["bytes"] == out.stat().st_size and not (tmp_path / "a.gguf.partial").exists()
    assert found["exit"] == bool(found["fallbacks"])
    weight_source = GgufWeightSource(out)
    assert set(ledger) == set(weight_source.shapes)
    judged = run(
        "eval", str(out), "--reference", str(MODEL), "--text", "stdlib-heldout", "--tokens", "1024", "--seqlen", "64"
    )
    assert judged["kl_mean"] < (0.1 if method == "gptq" else 0.3)
    tokenizer = read_tokenizer(out)
    text = "def f(x):\n    return x ** 2  # größer 123 \t\n\n"
    assert tokenizer(text)["input_ids"] == load_tokenizer(MODEL)(text)["input_ids"]
    head = ledger["model.embed_tokens.weight"]
    assert head.scheme == "q6_k" and (
        head.method == "gptq" and head.tokens > 0 if method == "gptq" else head.method == "rtn"
    )


def test_a_float_file_becomes_the_same_as_its_directory(tmp_path: Path, text: str) -> None:
    """From GGUF to GGUF: keys untouched, tensors as if quantized from the checkpoint itself."""
    source = make_checkpoint(tmp_path / "source", "llama", vocab_size=300)
    assert run("convert", str(source), str(tmp_path / "float.gguf"))["tensors"] == len(
        GgufWeightSource(tmp_path / "float.gguf").shapes
    )
    arguments = ["--scheme", "q4_k_m", "--calib", text, "--seqlen", "32", "--samples", "6"]
    for name, model in (("a", source), ("b", tmp_path / "float.gguf")):
        planned = run("quantize", str(model), str(tmp_path / f"{name}.gguf"), *arguments, "--dry-run")["bytes"]
        run("quantize", str(model), str(tmp_path / f"{name}.gguf"), *arguments)
        assert planned == (tmp_path / f"{name}.gguf").stat().st_size
    a, b, before = (GgufFile(tmp_path / f"{name}.gguf") for name in ("a", "b", "float"))
    assert set(a.tensors) == set(b.tensors) == set(before.tensors)
    assert all(a.raw(name).tobytes() == b.raw(name).tobytes() for name in a.tensors)
    carried = {name: value for name, value in before.keys.items() if name != "general.quantization_version"}
    assert all(
        str(b.keys[name]) == str(value) and b.kinds[name] == before.kinds[name] for name, value in carried.items()
    )
    refused = CliRunner().invoke(app, ["quantize", str(tmp_path / "b.gguf"), str(tmp_path / "c.gguf"), "--json"])
    assert refused.exit_code == 2 and "already quantized" in refused.stdout


def test_a_checkpoint_of_the_bare_model_makes_the_same_file(tmp_path: Path) -> None:
    """GPT-2 as hubs have it: h.0.attn.c_attn.weight, not transformer.h.0.attn.c_attn.weight."""
    whole, bare = (make_checkpoint(tmp_path / place / "m", "gpt2") for place in ("whole", "bare"))
    AutoModel.from_pretrained(bare).save_pretrained(bare)
    assert "h.0.attn.c_attn.weight" in load_file(bare / "model.safetensors")
    for source in (whole, bare):
        how = ["--scheme", "q8_0", "--method", "search", "--calib", "none"]
        run("quantize", str(source), str(source.with_suffix(".gguf")), *how)
    assert whole.with_suffix(".gguf").read_bytes() == bare.with_suffix(".gguf").read_bytes()


def test_no_text_and_what_does_not_go_together(tmp_path: Path) -> None:
    from bitwright.cli.demo import MODEL

    found = run(
        "quantize", str(MODEL), str(tmp_path / "a.gguf"), "--scheme", "q5_k", "--method", "search", "--calib", "none"
    )
    ledger = from_jsonl(tmp_path / "a.ledger.jsonl")
    assert found["fallbacks"] == [] and {e.method for e in ledger if e.scheme} == {"search"}
    for arguments, says in [
        (["x.gguf", "--format", "gptq"], "the format is gptq"),
        (["x", "--format", "gguf"], "the format is gguf"),
        (["x", "--scheme", "q4_k_m"], "is a mix of llama.cpp"),
        (["x.gguf", "--scheme", "q4_k_m", "--pure"], "is a mix of llama.cpp"),
        (["x.gguf", "--scheme", "int4-g128"], "no block type for int4-g128"),
        (["x.gguf", "--kv-cache", "int8-tensor"], "KV cache"),
        (["x.gguf", "--method", "outlier+gptq"], "no place for"),
    ]:
        done = CliRunner().invoke(app, ["quantize", str(MODEL), str(tmp_path / arguments[0]), *arguments[1:], "--json"])
        assert done.exit_code == 2 and says in done.stdout, (arguments, done.stdout)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("x")] == []


def test_pure_gives_one_type_and_a_rule_another(tmp_path: Path) -> None:
    from bitwright.cli.demo import MODEL

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('pure = true\n[[rule]]\nmatch = "*down_proj"\nscheme = "q6_k"\n')
    out = tmp_path / "a.gguf"
    run("quantize", str(MODEL), str(out), "--scheme", "q2_k", "--recipe", str(recipe), "--method", "rtn")
    types = {name: t.type.name for name, t in GgufFile(out).tensors.items() if len(t.shape) > 1}
    assert {t for name, t in types.items() if "ffn_down" in name} == {"Q6_K"}
    assert {t for name, t in types.items() if "ffn_down" not in name} == {"Q2_K"}


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS"])
def test_pure_types_without_a_scheme_of_their_own(name: str, tmp_path: Path) -> None:
    """TQ1_0 and TQ2_0 hold the same numbers: which of them it is, the container says."""
    from bitwright.cli.demo import MODEL

    out = tmp_path / "a.gguf"
    how = ["--scheme", name.lower(), "--pure", "--method", "search", "--calib", "none"]
    run("quantize", str(MODEL), str(out), *how)
    file = GgufFile(out)
    assert {t.type.name for t in file.tensors.values() if len(t.shape) > 1} == {name}
    assert {t["scheme"] for t in run("inspect", str(out))["tensors"]} >= {str(TYPES[name].scheme)}
    stored = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.0.ffn_up.weight")
    assert np.array_equal(file.read(stored.name).numpy(), dequantize(stored.data, stored.tensor_type))


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    for name in ("one", "two", "three"):
        writer.add_tensor(name, np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "m-00001-of-00003.gguf"
    assert set(GgufFile(first).tensors) == {"one", "two", "three"}
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GgufFile(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="part of a split model is missing"):
        GgufFile(first)


def test_a_part_of_another_place_or_model_is_named(tmp_path: Path) -> None:
    """Parts that changed names would be mixed without a word: each says which it is, and some of which model."""
    for number, name in enumerate(("one", "two", "three")):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", "llama")
        writer.add_name("here" if number < 2 else "elsewhere")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_tensor(name, np.ones((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first, second, third = (tmp_path / f"m-{number}-of-00003.gguf" for number in ("00001", "00002", "00003"))
    with pytest.raises(CheckpointError, match=r"its general\.name is 'elsewhere', that of the first 'here'") as caught:
        GgufFile(first)
    assert caught.value.where == str(third)
    second.rename(tmp_path / "x")
    third.rename(second)
    (tmp_path / "x").rename(third)
    with pytest.raises(
        CheckpointError, match=r"by its name part 2 of a split model, by its key split\.no = 2"
    ) as caught:
        GgufFile(first)


def test_a_split_model_is_one_model(tmp_path: Path, text: str) -> None:
    """Quantized from its parts as from one file; a part that is missing stops every command, by name."""
    source = make_checkpoint(tmp_path / "source", "llama")
    whole = tmp_path / "whole.gguf"
    run("convert", str(source), str(whole))
    file = GgufFile(whole)
    for number, own in enumerate((list(file.tensors)[:9], list(file.tensors)[9:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05d}-of-00002.gguf", "llama")
        if number == 1:
            carry_keys(writer, file)
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(file.tensors))
        for name in own:
            raw, shape = file.raw(name), file.tensors[name].shape
            floats = raw.view(np.float32).reshape(shape) if len(shape) == 1 else raw.reshape(shape[0], -1)
            writer.add_tensor(name, floats, raw_dtype=None if len(shape) == 1 else gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first = tmp_path / "m-00001-of-00002.gguf"
    how = ["--scheme", "q4_0", "--method", "search", "--calib", "none"]
    for name, model in (("a", whole), ("b", first)):
        run("quantize", str(model), str(tmp_path / f"{name}.gguf"), *how)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    for arguments in (
        ["quantize", str(first), str(tmp_path / "c.gguf")], ["eval", str(first), "--text", text], ["inspect", str(first)],
        ["generate", str(first), "--prompt", "x"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 2 and "part of a split model is missing" in done.stdout, (arguments, done.stdout)
        assert "m-00002-of-00002.gguf" in done.stdout


def shortened_embedding(content: bytes) -> bytes:
    """The embedding said to have fewer rows than there are tokens."""
    name = b"token_embd.weight"
    at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    K, rows = struct.unpack_from("<QQ", content, at)
    return content[:at] + struct.pack("<QQ", K, rows - 32) + content[at + 16 :]


def with_count(key: bytes, value: int) -> Callable[[bytes], bytes]:
    """A key of 32 bits with another value."""

    def change(content: bytes) -> bytes:
        at = content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
        return content[:at] + struct.pack("<I", value) + content[at + 4 :]

    return change


def of_type(kind: int) -> Callable[[bytes], bytes]:
    """The embedding said to be of another type."""
    name = b"token_embd.weight"

    def change(content: bytes) -> bytes:
        at = content.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
        return content[:at] + struct.pack("<I", kind) + content[at + 4 :]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.replace(b"llama.block_count", b"llama.block_kount"), "block_count is missing"),
        (lambda c: c.replace(b"general.architecture", b"general.architexture"), "architecture None is not read"),
        (
            lambda c: c.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1),
            "architecture 'bloom' is not read",
        ),
        (lambda c: c.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokans"), "no tokens"),
        (lambda c: c.replace(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-9"), "pre-tokenizer 'gpt-9'.*known"),
        (lambda c: c.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0gptx"), "family 'gptx'.*known"),
        (with_count(b"llama.block_count", 10**9), "1000000000 blocks are announced"),
        (with_count(b"llama.feed_forward_length", 2**31 - 1), "the keys mean"),
        (with_count(b"llama.embedding_length", 2**31 - 4), "the keys mean|no model|no config"),
        (with_count(b"llama.attention.head_count", 0), "no config|no model"),
        (lambda c: c.replace(b"token_embd.weight", b"token_embd.wait!!"), "token_embd.weight is missing"),
        (lambda c: c.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"), "blk.0.attn_z.weight"),
        (shortened_embedding, "its vocabulary has"),
        (of_type(99), "unknown type, 99"),
        (of_type(28), "ends at|misplaced"),
    ],
)
def test_a_model_s_file_that_lacks_something_is_refused(
    change: Callable[[bytes], bytes], says: str, tmp_path: Path, text: str
) -> None:
    from bitwright.cli.demo import MODEL

    whole, bad = tmp_path / "whole.gguf", tmp_path / "bad.gguf"
    run("convert", str(MODEL), str(whole))
    bad.write_bytes(change(whole.read_bytes()))
    assert bad.read_bytes() != whole.read_bytes()
    done = CliRunner().invoke(app, ["eval", str(bad), "--text", text, "--tokens", "64", "--json"])
    assert done.exit_code == 2, done.stdout
    assert re.search(says, done.stdout), done.stdout
    assert "remedy" in done.stdout


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bert", "xlm-roberta", "distilbert"])
def test_a_model_with_changed_bytes_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    """Keys that make no sense to a model or a tokenizer: an error of ours, and nothing built of what they claim."""
    import random

    from bitwright.models.streamed import StreamedModel

    source, file = make_checkpoint(tmp_path / "source", kind), tmp_path / "a.gguf"
    run("convert", str(source), str(file))
    whole, end, rng = file.read_bytes(), min(t.offset for t in GgufFile(file).tensors.values()), random.Random(0)
    changes = [struct.pack("<Q", n) for n in (0, 1, 2**31 - 1, 2**63, 10**9)]
    changes += [struct.pack("<I", n) for n in range(12)] + [struct.pack("<f", x) for x in (float("nan"), -1.0, 1e30)]
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, change = rng.randrange(end - 8), rng.choice([*changes, bytes([rng.randrange(256)])])
            content[at : at + len(change)] = change
        file.write_bytes(content)
        for reader in (StreamedModel, read_tokenizer):
            try:
                reader(file)
            except InputError:
                refused += 1
    assert 10 < refused < 120


def test_an_importance_matrix_there_and_back(tmp_path: Path, llama: Path, text: str) -> None:
    """Written, read, used: as the same text would have been by a search with one-shot statistics."""
    from bitwright.gguf import imatrix

    file = tmp_path / "m.gguf"
    made = run("imatrix", str(llama), str(file), "--calib", text, "--samples", "8", "--seqlen", "32")
    found = imatrix.read(file)
    assert made["tensors"] == len(found) == 3 * 7 and made["tokens"] == 8 * 32
    assert torch.equal(found["blk.0.attn_q.weight"], found["blk.0.attn_k.weight"])
    same = ["--samples", "8", "--seqlen", "32", "--scheme", "q5_1", "--method", "search"]
    run("quantize", str(llama), str(tmp_path / "a.gguf"), "--calib", str(file), *same)
    run("quantize", str(llama), str(tmp_path / "b.gguf"), "--calib", text, "--store", str(tmp_path / "s"), *same)
    a, b = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert all(a.raw(name).tobytes() == b.raw(name).tobytes() for name in a.tensors if name.startswith("blk"))
    refused = CliRunner().invoke(
        app, ["quantize", str(llama), str(tmp_path / "c.gguf"), "--calib", str(file), "--json"]
    )
    assert refused.exit_code == 2 and "how inputs go together" in refused.stdout


def test_older_importance_matrices_and_damaged_ones(tmp_path: Path) -> None:
    from bitwright.errors import CalibrationError
    from bitwright.gguf import imatrix

    name = b"blk.0.attn_q.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii4f", 2, 4, 2.0, 4.0, 6.0, 8.0)
    file = tmp_path / "m.dat"
    file.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 7, 4) + b"text")
    assert imatrix.read(file)["blk.0.attn_q.weight"].tolist() == [1, 2, 3, 4]
    whole = file.read_bytes()
    for content in [*(whole[:n] for n in range(0, 50, 3)), struct.pack("<i", 1) + struct.pack("<i", -5), b"\xff" * 200]:
        file.write_bytes(content)
        with pytest.raises(CalibrationError):
            imatrix.read(file)
    file.write_bytes(struct.pack("<i", 1) + entry[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(CalibrationError, match="not finite"):
        imatrix.read(file)
