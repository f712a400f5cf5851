"""Keys of GGUF files that other tools wrote, or that lack some: read as llama.cpp reads them, or refused.

The right values were compared with llama.cpp's logprobs of such files.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.gguf_families import random_model, small_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import rope
from bitwright.gguf.config_keys import config_of, keys_of
from bitwright.pipeline.conversion import convert
from conftest import save_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
OWN = 1 + 0.1 * math.log(4)  # YaRN's factor of queries and keys


def scaled(name: str = "llama", **keys: Any) -> dict[str, Any]:
    """rope_parameters for keys of scaling; "__" stands for a dot."""
    given = {f"{name}.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
    return rope.parameters_of(name, given, {}, 16, "x")


def test_a_factor_counts_without_a_type() -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert scaled(scaling__factor=4.0) == scaled(scale_linear=4.0) == linear  # the latter in the first files
    assert scaled(scaling__factor=4.0, scaling__type="none") == scaled(scaling__type="linear") == scaled()


def test_a_factor_of_queries_and_keys() -> None:
    keys: dict[str, Any] = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 32}
    assert scaled(**keys) == YARN
    assert scaled(**keys, scaling__attn_factor=2.0) == YARN | {"attention_factor": pytest.approx(2 * OWN)}
    with pytest.raises(CheckpointError, match=r"attn_factor = 2\.0"):
        scaled(scaling__attn_factor=2.0)
    config = small_config("llama", rope_parameters=YARN | {"attention_factor": 1.5})
    written = rope.keys_of("llama", config)
    assert written["llama.rope.scaling.attn_factor"] == pytest.approx(1.5 / OWN)
    assert rope.parameters_of("llama", written, {}, 16, "x")["attention_factor"] == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["stablelm", "glm4", "gpt_neox", "phi", "nemotron"])
def test_whole_heads_may_be_rotated(kind: str) -> None:
    """By models of which transformers rotates a part, unless the config says how much: RedPajama's GPT-NeoX."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    config = small_config(kind, rope_parameters=parameters)
    back = config_of(keys_of(config), shapes(), "x")
    assert back.rope_parameters["partial_rotary_factor"] == 1


def shapes(depth: int = 8) -> dict[str, tuple[int, ...]]:
    return {"token_embd.weight": (2048, 64), **{f"blk.{i}.attn_norm.weight": (64,) for i in range(depth)}}


def test_heads_are_of_a_size_that_the_file_says() -> None:
    with pytest.raises(FormatError, match="head_dim = 32"):
        keys_of(small_config("qwen2", head_dim=32))
    assert keys_of(small_config("granite", head_dim=32))["granite.attention.key_length"] == 32
    keys = keys_of(small_config("qwen3"))
    without = {key: value for key, value in keys.items() if not key.endswith(("key_length", "value_length"))}
    assert config_of(without, shapes(), "x").head_dim == 16  # not transformers' 128


def test_values_of_layers_are_one_or_refused() -> None:
    keys = keys_of(small_config("llama"))
    alike = {"llama.feed_forward_length": [128] * 8, "llama.attention.head_count_kv": [2] * 8}
    back = config_of(keys | alike, shapes(), "x")
    assert (back.intermediate_size, back.num_key_value_heads) == (128, 2)
    with pytest.raises(CheckpointError, match="differs from layer to layer"):
        config_of(keys | {"llama.attention.head_count_kv": [2] * 7 + [4]}, shapes(), "x")
    with pytest.raises(CheckpointError):  # arrays in arrays
        config_of(keys | {"llama.attention.head_count_kv": [np.ones(2), np.zeros(2)]}, shapes(), "x")


@pytest.mark.parametrize(
    ("kind", "key", "attribute", "meant"),
    [
        ("granite", "attention.scale", "attention_multiplier", 0.25),
        ("granite", "embedding_scale", "embedding_multiplier", 1.0),
        ("granitemoehybrid", "attention.scale", "attention_multiplier", 0.25),
        ("cohere", "logit_scale", "logit_scale", 1.0),
        ("deepseek_v3", "expert_weights_scale", "routed_scaling_factor", 1.0),
    ],
)
def test_a_factor_that_is_missing_or_zero_is_what_llama_cpp_takes(
    kind: str, key: str, attribute: str, meant: float
) -> None:
    keys = keys_of(small_config(kind))
    name = f"{keys['general.architecture']}.{key}"
    for changed in ({n: v for n, v in keys.items() if n != name}, keys | {name: 0.0}):
        assert getattr(config_of(changed, shapes(), "x"), attribute) == meant


def test_experts_without_keys_are_in_one_group_and_their_weights_as_they_are() -> None:
    keys = keys_of(small_config("deepseek_v3"))
    gone = [f"deepseek2.expert_{key}" for key in ("weights_norm", "group_count", "group_used_count")]
    found = config_of({key: value for key, value in keys.items() if key not in gone}, shapes(), "x")
    assert (found.norm_topk_prob, found.n_group, found.topk_group) == (False, 1, 1)
    keys.pop("deepseek2.rope.scaling.yarn_log_multiplier")
    with pytest.raises(CheckpointError, match="'yarn', without deepseek2"):
        config_of(keys, shapes(), "x")


def test_a_gemma_3_without_a_window_has_none_in_any_layer() -> None:
    keys = keys_of(small_config("gemma3_text"))
    keys.pop("gemma3.attention.sliding_window")
    assert set(config_of(keys, shapes(), "x").layer_types) == {"full_attention"}


def test_a_mistral_3_without_a_temperature_or_a_type_of_positions() -> None:
    keys = keys_of(small_config("ministral3"))
    keys.pop("mistral3.attention.temperature_scale")
    keys.pop("mistral3.rope.scaling.type")
    found = config_of(keys, shapes(), "x").rope_parameters
    assert (found["rope_type"], found[rope.TEMPERATURE], found["original_max_position_embeddings"]) == (
        "linear",
        0.0,
        32,
    )


def test_states_beside_positions_that_no_key_denies_are_refused() -> None:
    keys = keys_of(small_config("granitemoehybrid"))
    keys.pop("granitehybrid.rope.scaling.finetuned")
    with pytest.raises(CheckpointError, match="beside rotary positions"):
        config_of(keys, shapes(), "x")


@pytest.mark.parametrize("kind", ["starcoder2", "qwen3_next", "qwen3_5_moe_text", "llama"])
def test_without_heads_of_keys_there_are_as_many_as_of_queries(kind: str) -> None:
    keys = keys_of(small_config(kind))
    keys.pop(f"{keys['general.architecture']}.attention.head_count_kv")
    assert config_of(keys, shapes(), "x").num_key_value_heads == 4  # not transformers' 2


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("jamba", "ssm.state_size"), ("falcon_h1", "ssm.group_count"), ("gemma4_text", "attention.sliding_window"),
        ("cohere2", "logit_scale"), ("gpt_oss", "attention.sliding_window"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_guess_is_not_guessed_here(kind: str, key: str) -> None:
    keys = keys_of(small_config(kind))
    keys.pop(f"{keys['general.architecture']}.{key}")
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        config_of(keys, shapes(), "x")


def test_experts_are_as_many_as_the_tensors_hold() -> None:
    keys = keys_of(small_config("qwen3_moe"))
    held = {"blk.0.ffn_up_exps.weight": (4, 64, 64)}
    assert config_of(keys, shapes() | held, "x").num_experts == 4
    with pytest.raises(CheckpointError, match=r"expert_count = 8, and tensor 'blk\.0\.ffn_up_exps\.weight' holds 4"):
        config_of(keys | {"qwen3moe.expert_count": 8}, shapes() | held, "x")
    with pytest.raises(CheckpointError, match="1024 at most"):
        config_of(keys | {"qwen3moe.expert_count": 2**32 - 1}, shapes(), "x")
    for odd in ("eight", [8, "eight"], [[1], [1, 2]], np.array([4, 8])):
        with pytest.raises(CheckpointError, match="expert_count"):
            config_of(keys | {"qwen3moe.expert_count": odd}, shapes(), "x")
    for used in (0, -1, 5):
        with pytest.raises(CheckpointError, match="1 to 4 experts"):
            config_of(keys | {"qwen3moe.expert_used_count": used}, shapes() | held, "x")
    with pytest.raises(CheckpointError, match="expert_count = 0, and tensor"):
        config_of({key: value for key, value in keys.items() if ".expert_" not in key}, shapes() | held, "x")
    others = held | {"blk.1.ffn_up_exps.weight": (3, 64, 64)}
    with pytest.raises(CheckpointError, match=r"expert_count = 4, and tensor 'blk\.1\.ffn_up_exps\.weight' holds 3"):
        config_of(keys, shapes() | others, "x")


@pytest.mark.parametrize("key", ["context_length", "expert_used_count", "attention.layer_norm_rms_epsilon"])
def test_keys_without_which_llama_cpp_loads_nothing_are_missed(key: str) -> None:
    keys = keys_of(small_config("qwen3_moe"))
    keys.pop(f"qwen3moe.{key}")
    with pytest.raises(CheckpointError, match=f"qwen3moe.{key} is missing"):
        config_of(keys, shapes(), "x")


def test_a_decoder_that_looks_ahead_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"attention\.causal"):
        config_of(keys_of(small_config("qwen2")) | {"qwen2.attention.causal": False}, shapes(), "x")


def test_factors_of_frequencies_that_are_not_llama_3_s() -> None:
    """Such as Llama 4 Scout's, whose two bounds are one: there and back, and refused where llama.cpp has no such tensor."""
    scout = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = small_config("llama", rope_parameters=scout, head_dim=128)
    factors = rope.tensors_of(config)
    assert set(factors[rope.FACTORS].tolist()) == {1.0, 16.0}
    keys = keys_of(config)
    back = config_of(keys, shapes(), "x", factors)
    inverse = ROPE_INIT_FUNCTIONS["longrope"](back, torch.device("cpu"))
    meant = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert torch.allclose(inverse[0], meant[0]) and inverse[1] == meant[1] == 1
    assert keys_of(back) == keys and torch.equal(rope.tensors_of(back)[rope.FACTORS], factors[rope.FACTORS])
    twice = rope.parameters_of("llama", {"llama.rope.scaling.factor": 2.0}, factors, 128, "x")
    assert twice["long_factor"] == (2 * factors[rope.FACTORS]).tolist() and "factor" not in twice
    with pytest.raises(CheckpointError, match="beside positions of type 'yarn'"):
        rope.parameters_of("llama", {"llama.rope.scaling.type": "yarn"}, factors, 128, "x")
    with pytest.raises(FormatError, match="'llama3' in qwen2"):
        keys_of(small_config("qwen2", rope_parameters=scout))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None}), ("gemma2", {"final_logit_softcapping": None}),
        ("qwen3", {"attention_bias": True}), ("qwen3_moe", {"attention_bias": True}), ("smollm3", {"mlp_bias": True}),
        ("arcee", {"attention_bias": True}), ("deepseek_v2", {"q_lora_rank": None}),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_not_load_or_run_otherwise_is_refused(kind: str, changes: dict[str, Any]) -> None:
    keys_of(small_config(kind))
    with pytest.raises(FormatError, match=next(iter(changes))):
        keys_of(small_config(kind, **changes))


def test_a_note_on_windows_that_are_not_kept(tmp_path: Path) -> None:
    random_model("mistral", sliding_window=8, vocab_size=257, bos_token_id=256, eos_token_id=256).save_pretrained(
        tmp_path / "a"
    )
    save_tokenizer(tmp_path / "a")
    assert any("not to the last 8 alone" in note for note in convert(tmp_path / "a", tmp_path / "a.gguf")["notes"])
