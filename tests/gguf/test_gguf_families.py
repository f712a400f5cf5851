"""Architectures of GGUF without another test: the file's logits are its checkpoint's. bench.gguf_families asks llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gguf_families import GLM_MIXTURE, random_model, small_config
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from bitwright import load, quantize
from bitwright.errors import CheckpointError, FormatError
from bitwright.formats.gguf_writer import FLOAT_TYPES, GgufWriter
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.gguf.block_types import Types
from bitwright.gguf.config_keys import architecture_of, config_of, keys_of
from bitwright.gguf.file_types import Place, type_in
from bitwright.gguf.header import Typed
from bitwright.gguf.reader import GgufFile
from bitwright.inference.lookup import Lookup
from bitwright.models.gguf_source import FloatGgufCheckpoint
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert
from conftest import ENCODERS, FAMILIES, SIZES, save_roberta, save_tokenizer, save_wordpiece

EXPERTS = {**GLM_MIXTURE, "moe_shared_expert_intermediate_size": 96}
NEWER = ["modernbert", "eurobert", "gemma-embedding", "nomic_bert"]  # encoders
EVEN_HEADS = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
ROUTED = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
OTHERS = [kind for kind in ARCHITECTURES if kind not in (*FAMILIES, *ENCODERS, *NEWER) or kind == "gpt_neox"]


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_logits_are_transformers(kind: str, tmp_path: Path) -> None:
    model = random_model(kind, num_hidden_layers=4, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    streamed, ids = StreamedModel(tmp_path / "a.gguf"), torch.arange(24)[None] * 7 % 256
    found, wanted = streamed.head(torch.cat(streamed.hidden(ids))), model(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", NEWER)
def test_an_encoder_s_last_hidden_state_is_transformers(kind: str, tmp_path: Path) -> None:
    model = random_model(kind, num_hidden_layers=4, vocab_size=262)
    model.save_pretrained(tmp_path / "source")
    (save_wordpiece if kind == "nomic_bert" else save_roberta)(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    ids = torch.arange(24)[None] * 7 % 256
    assert torch.allclose(load(tmp_path / "a.gguf")(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("granitemoehybrid", {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"}, "granitemoe"),
        (
            "granitemoehybrid",
            {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope", "num_local_experts": 0},
            "granite",
        ),
        ("granitemoehybrid", {"num_local_experts": 0}, "granitehybrid"),
        (
            "nemotron_h",
            {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], **EXPERTS},
            "nemotron_h_moe",
        ),
        (
            "gemma4_text",
            {**EVEN_HEADS, **ROUTED, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
            "gemma4",
        ),
    ],
)
def test_other_forms_of_a_kind(kind: str, changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    """One model_type of transformers that llama.cpp has as several architectures."""
    model = random_model(kind, num_hidden_layers=4, vocab_size=257, bos_token_id=256, eos_token_id=256, **changes)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    streamed, ids = StreamedModel(tmp_path / "a.gguf"), torch.arange(24)[None] * 7 % 256
    found, wanted = streamed.head(torch.cat(streamed.hidden(ids))), model(ids).logits
    assert GgufFile(tmp_path / "a.gguf").keys["general.architecture"] == name
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act"),
        ("llama4_text", {"attention_chunk_size": 16}, "attention_chunk_size"),
        ("llama4_text", {"use_qk_norm": False}, "use_qk_norm"),
        ("mamba", {"expand": 4}, "expand"),
        ("granitemoehybrid", {"position_embedding_type": "rope"}, "position_embedding_type"),
        ("gemma3n_text", {"laurel_rank": 8, "num_kv_shared_layers": 0}, "laurel_rank"),
        ("gemma4_text", {"layer_types": ["full_attention"] * 4}, "all without"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        (
            "gemma4_text",
            {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_kv_shared_layers": 2},
            "layers 0 and 1",
        ),
        ("gemma4_text", {"per_layer_config": {1: {"head_dim": 16}}}, "heads of"),
        ("gemma4_text", {"vocab_size": 100, "vocab_size_per_layer_input": 101}, "embeddings of layers"),
        (
            "gemma4_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "'proportional' with",
        ),
        (
            "qwen3_5_text",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [199, 99, 9]}},
            "sections",
        ),
    ],
)
def test_what_llamacpp_has_otherwise_is_refused(kind: str, change: dict[str, Any], says: str) -> None:
    config = AutoConfig.for_model(
        kind, **{**SIZES, "num_hidden_layers": 4, "pad_token_id": 1, "vocab_size_per_layer_input": 257, **change}
    )
    with pytest.raises(FormatError, match=says):
        keys_of(config)


@torch.no_grad()
def test_blocks_of_multi_token_prediction_are_left_unread(tmp_path: Path) -> None:
    """As in published files of GLM-4.5: block_count has them too. They are neither needed nor lost."""
    model = random_model("glm4_moe", num_hidden_layers=2, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    made, more = GgufFile(tmp_path / "a.gguf"), {"blk.2.nextn.eh_proj.weight": torch.ones(64, 128)}
    keys = {name: Typed(value, *made.kinds[name]) for name, value in made.keys.items()}
    keys |= {"general.architecture": "glm4moe", "glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    tensors = {name: made.read(name) for name in made.tensors} | more
    with GgufWriter(tmp_path / "b.gguf", keys, [(n, FLOAT_TYPES[t.dtype], t) for n, t in tensors.items()]) as file:
        for name, tensor in tensors.items():
            file.put_floats(name, tensor)
    streamed, ids = StreamedModel(tmp_path / "b.gguf"), torch.arange(24)[None] * 7 % 256
    wanted = model(ids).logits
    assert torch.allclose(streamed.head(torch.cat(streamed.hidden(ids))), wanted, atol=1e-4 * float(wanted.abs().max()))
    with pytest.raises(CheckpointError, match="multi-token prediction"):
        FloatGgufCheckpoint(tmp_path / "b.gguf")


def rewritten(path: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A float file with other tensors."""
    made = GgufFile(path)
    keys = {name: Typed(value, *made.kinds[name]) for name, value in made.keys.items()}
    tensors = {name: made.read(name) for name in made.tensors}
    change(tensors)
    keys |= {"general.architecture": made.keys["general.architecture"]}
    with GgufWriter(out, keys, [(n, FLOAT_TYPES[t.dtype], t) for n, t in tensors.items()]) as file:
        for name, tensor in tensors.items():
            file.put_floats(name, tensor)


@torch.no_grad()
def test_gemma_4_as_llama_cpp_s_converter_has_it(tmp_path: Path) -> None:
    """Gates and ups of all experts in one tensor; keys and values in layers that take those of earlier ones, unread."""
    shared = {
        "num_kv_shared_layers": 2,
        "vocab_size": 257,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "num_hidden_layers": 4,
    }
    model = random_model("gemma4_text", **shared, **ROUTED)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for i in range(4):
            both = [tensors.pop(f"blk.{i}.ffn_{which}_exps.weight") for which in ("gate", "up")]
            tensors[f"blk.{i}.ffn_gate_up_exps.weight"] = torch.cat(both, 1)
        tensors["blk.3.attn_k.weight"] = torch.ones(64, 64)

    rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", change)
    streamed, ids = StreamedModel(tmp_path / "b.gguf"), torch.arange(24)[None] * 7 % 256
    wanted = model(ids).logits
    assert torch.allclose(streamed.head(torch.cat(streamed.hidden(ids))), wanted, atol=1e-4 * float(wanted.abs().max()))
    rewritten(
        tmp_path / "b.gguf", tmp_path / "c.gguf", lambda t: t.update({"rope_freqs.weight": torch.full((16,), 2.0)})
    )
    with pytest.raises(CheckpointError, match="not Gemma 4's"):
        StreamedModel(tmp_path / "c.gguf")
    rewritten(tmp_path / "b.gguf", tmp_path / "d.gguf", lambda t: t.update({"blk.0.attn_k_b.weight": torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match="attn_k_b"):
        StreamedModel(tmp_path / "d.gguf")


@torch.no_grad()
def test_queries_keys_and_values_of_an_encoder_are_one_tensor(tmp_path: Path, text: str) -> None:
    """As in its checkpoint; each is rounded by itself, and all into blocks of one type."""
    model = random_model("nomic_bert", num_hidden_layers=2, vocab_size=262)
    model.save_pretrained(tmp_path / "source")
    save_wordpiece(tmp_path / "source")
    assert "encoder.layers.0.attn.Wqkv.weight" in load_file(tmp_path / "source/model.safetensors")
    quantize(tmp_path / "source", tmp_path / "a.gguf", scheme="q8_0", calib=text, samples=2, seqlen=32)
    file, own = GgufFile(tmp_path / "a.gguf"), model.layers[1].self_attn
    assert file.tensors["blk.1.attn_qkv.weight"].type == Types.Q8_0
    wanted = torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
    assert torch.allclose(file.read("blk.1.attn_qkv.weight"), wanted, atol=0.01)
    ids = torch.arange(24)[None] * 7 % 100
    a, b = model(ids).last_hidden_state, load(tmp_path / "a.gguf")(ids).last_hidden_state
    assert torch.cosine_similarity(a, b, dim=-1).min() > 0.999


@torch.no_grad()
def test_parameters_of_an_activation_are_keys(tmp_path: Path, text: str) -> None:
    """Apertus: written into the header with the weights, by `convert` and by `quantize`, of a directory and of a file."""
    model = random_model("apertus", num_hidden_layers=2, vocab_size=257, bos_token_id=256, eos_token_id=256)
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    drawn = {"scheme": "q8_0", "calib": text, "samples": 2, "seqlen": 32}
    quantize(tmp_path / "source", tmp_path / "b.gguf", **drawn)
    quantize(tmp_path / "a.gguf", tmp_path / "c.gguf", **drawn)
    wanted = {
        f"xielu.{name}": [float(model.get_submodule(f"model.layers.{i}.mlp.act_fn").state_dict()[name]) for i in (0, 1)]
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    }
    for name in "abc":
        file = GgufFile(tmp_path / f"{name}.gguf")
        assert {key: file.keys[key].tolist() for key in wanted} == wanted
        assert not any("xielu" in tensor for tensor in file.tensors)
        found = load(tmp_path / f"{name}.gguf").get_submodule("model.layers.1.mlp.act_fn").state_dict()
        assert all(
            torch.equal(value, found[name]) for name, value in model.model.layers[1].mlp.act_fn.state_dict().items()
        )
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "d.gguf").write_bytes(content.replace(b"xielu.beta", b"xielu.bete"))
    with pytest.raises(CheckpointError, match="act_fn"):
        load(tmp_path / "d.gguf")


@torch.no_grad()
def test_embeddings_of_layers_are_quantized(tmp_path: Path) -> None:
    """Gemma's table with a part for each layer, maybe half of all weights: in the mix's type, and read a row at a time."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    random_model("gemma4_text", **sizes, hidden_size_per_layer_input=64).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "a.gguf", scheme="q4_k_m", method="search", calib="none")
    assert GgufFile(tmp_path / "a.gguf").tensors["per_layer_token_embd.weight"].type == Types.Q4_K
    model, ids = load(tmp_path / "a.gguf"), torch.arange(24)[None] * 7 % 256
    table = model.get_submodule("model.embed_tokens_per_layer")
    assert isinstance(table, Lookup) and table.rows.dtype == torch.uint8
    streamed = StreamedModel(tmp_path / "a.gguf")
    wanted = streamed.head(torch.cat(streamed.hidden(ids)))
    assert torch.allclose(model(ids).logits, wanted, atol=1e-2 * float(wanted.abs().max()))
    low = Place("per_layer_token_embd", 0, 4, 2, False, True)
    assert (type_in("IQ2_XS", low), type_in("Q4_K_M", low)) == ("Q2_K", "Q4_K")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention.head_count_kv": [2, 2]}, "2 values for 4 layers"),
        ({"attention.sliding_window_pattern": []}, "0 values for 4 layers"),
        ({"feed_forward_length": [128, 256, 128, 128]}, "MLPs of"),
    ],
)
def test_values_of_layers_must_be_as_many(change: dict[str, Any], says: str) -> None:
    config = small_config("gemma4_text", num_hidden_layers=4)
    keys = keys_of(config) | {f"gemma4.{key}": value for key, value in change.items()}
    shapes = {"token_embd.weight": (2048, 64), **{f"blk.{i}.attn_norm.weight": (64,) for i in range(4)}}
    with pytest.raises(CheckpointError, match=says):
        config_of(keys, shapes, "x")


def test_no_weights_make_phimoe_llamacpp_s() -> None:
    """Why it has no row: a token's weights of experts add up to 2 or to less, as its scores lie; llama.cpp's never differ."""
    scores = torch.tensor([[4.0, 1.0, 0.5, 0.1], [4.0, 3.99, 0.5, 0.1]])
    weights, _ = sparsemixer(scores, jitter_eps=0.01, training=False)
    assert torch.allclose(weights.sum(-1), torch.tensor([2.0, 1.5]), atol=0.01)
    with pytest.raises(FormatError, match="'phimoe' cannot be written") as caught:
        architecture_of(AutoConfig.for_model("phimoe"))
    assert "SparseMixer" in caught.value.remedy
