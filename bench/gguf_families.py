"""Each architecture of GGUF: a small random checkpoint made a file; its logprobs must be transformers' and llama.cpp's.

    python -m bench.gguf_families [--kinds granite,olmo2] [--scheme q4_k_m] [--oracle PYTHON]

For each architecture: how far the logprobs that our reader computes from the float file are from transformers' on the
checkpoint; how far llama.cpp's of that file are from them; its of a quantized file (marked -q) from ours with inputs rounded
as it does, which in random models, sharp as they are, choose other experts; and its of the same weights in a float file
(marked -d) from ours of the quantized one with inputs in float. Of encoders the same of the last hidden state, in float.
Needs `bench/peers/install.sh xllamacpp`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from bench.gguf_pretokenizers import ORACLE, answers
from bitwright import load, quantize
from bitwright.cli.demo import MODEL
from bitwright.errors import InputError
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.gguf.input_rounding import ENGINE
from bitwright.models.families import is_encoder
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
GLM_MIXTURE = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
SECTIONS = {
    "head_dim": 32, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8},
    "gemma-embedding": {
        "query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8, "use_bidirectional_attention": True,
    },
    "gemma": {"head_dim": 16}, "qwen3": {"head_dim": 16}, "seed_oss": {"head_dim": 16},
    "glm4": {"head_dim": 16}, "ernie4_5": {"head_dim": 16}, "cohere2": {"sliding_window": 8, "logit_scale": 0.25},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo": {"clip_qkv": 1.0}, "qwen3_moe": {"head_dim": 16, **MIXTURE},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MIXTURE, "norm_topk_prob": False, "shared_expert_intermediate_size": 96, "tie_word_embeddings": False},
    "olmo3": {"sliding_window": 8, "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "granitemoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "glm4_moe": {"head_dim": 16, **GLM_MIXTURE, "use_qk_norm": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": 7,
    },
    "deepseek_v2": {**LATENT, **GLM_MIXTURE, "norm_topk_prob": False},
    "deepseek_v3": {
        **LATENT, **GLM_MIXTURE, "n_group": 2, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32,
            "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": {
        "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
    },
    "hunyuan_v1_dense": {
        "head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10000.0, "factor": 1.0},
    },
    "hunyuan_v1_moe": {
        "head_dim": 16, "num_experts": 4, "moe_topk": 2,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10000.0, "factor": 1.0},
    },
    "ministral3": {
        "head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "exaone4": {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 8},
    "falcon": {"ffn_hidden_size": 256, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "llama4_text": {"intermediate_size_mlp": 96, "num_local_experts": 4, "head_dim": 16, "interleave_moe_layer_step": 2},
    "qwen3_next": {**MIXTURE, **DELTA, "head_dim": 16, "shared_expert_intermediate_size": 96},
    "qwen3_5_text": {**DELTA, **SECTIONS},
    "qwen3_5_moe_text": {**MIXTURE, **DELTA, **SECTIONS, "shared_expert_intermediate_size": 96},
    "lfm2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_dense_layers": 2,
        "layer_types": ["conv", "full_attention"] * 4,
    },
    "gemma3n_text": {  # wide, since llama.cpp divides the variance by one less
        "intermediate_size": 1024,
        "head_dim": 16, "vocab_size_per_layer_input": 2000, "sliding_window": 8, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95] * 8, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    },
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    "modernbert": {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 0}, "eurobert": {"mask_token_id": 1},
    "nomic_bert": {"initializer_range": 0.1},
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8, "mixer_rms_eps": 1e-5},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "granitemoeshared": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96, "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96, "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "layer_types": ["linear_attention", "full_attention"] * 4,
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 2, "mamba_num_heads": 4,
        "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16, "head_dim": 16,
    },
    "falcon_h1": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "head_dim": 16,
        "embedding_multiplier": 3.0, "lm_head_multiplier": 0.7, "key_multiplier": 0.6, "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.4, "mlp_multipliers": [0.9, 0.7],
        "ssm_multipliers": [0.4, 0.5, 0.6, 0.7, 0.8], "tie_word_embeddings": False,
    },
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 4, "attn_layer_offset": 1, "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4, "block_multiple_of": 32},
}  # fmt: skip
FORMS = {"gemma-embedding": "gemma3_text"}  # a kind by llama.cpp's name: transformers' kind
PROMPT = 24  # tokens


def small_config(kind: str, **sizes: Any) -> PretrainedConfig:
    """A config of a kind. sizes: instead of those of `SIZES`."""
    options = SIZES | CHANGES.get(kind, {}) | sizes
    if "hidden_size_per_layer_input" in options:
        options["vocab_size_per_layer_input"] = options["vocab_size"]
    for layers in ("layer_types", "layers_block_type", "activation_sparsity_pattern"):
        if layers in options:
            options[layers] = options[layers][: options["num_hidden_layers"]]
    return AutoConfig.for_model(FORMS.get(kind, kind), **options)


def made_by(kind: str) -> type[AutoModel | AutoModelForCausalLM]:
    """What makes a model of a kind."""
    return AutoModel if is_encoder(small_config(kind)) else AutoModelForCausalLM


def random_model(kind: str, **sizes: Any) -> PreTrainedModel:
    """A random model of a kind, whose vectors differ from ones and zeros."""
    torch.manual_seed(0)
    model = made_by(kind).from_config(small_config(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def checkpoint(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a kind, with a tokenizer."""
    random_model(kind).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # some kinds cut texts in a way of their own
    return folder


@torch.no_grad()
def expected(folder: Path, ids: Tensor) -> Tensor:
    """transformers' logprobs behind a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids).logits[0, -1].log_softmax(-1)


def logprobs(file: Path, ids: Tensor, engine: str | None = None) -> Tensor:
    """Ours behind a prompt, by the file as it is read here."""
    streamed = StreamedModel(file, engine=engine)
    return streamed.head(torch.cat(streamed.hidden(ids)))[0, -1].log_softmax(-1)


def files_of(kind: str, place: Path, ids: Tensor, scheme: str) -> dict[Path, Tensor]:
    """A float file, a rounded one and one of its weights in float, with the logprobs that llama.cpp must give: transformers' of
    the checkpoint, ours of the rounded file with inputs rounded as llama.cpp does, and ours of it with inputs in float."""
    source, whole, rounded = checkpoint(kind, place / kind, MODEL), place / f"{kind}.gguf", place / f"{kind}-q.gguf"
    convert(source, whole)
    wanted = expected(source, ids)
    print(f"{kind}: ours differs by {float((logprobs(whole, ids) - wanted).abs().max()):.1e}", flush=True)
    quantize(source, rounded, scheme=scheme, method="search", calib="none")
    decoded = place / f"{kind}-d.gguf"
    quantize(rounded, decoded, scheme="f32", method="rtn", calib="none", requantize=True)
    return {whole: wanted, rounded: logprobs(rounded, ids, ENGINE), decoded: logprobs(rounded, ids)}


@torch.no_grad()
def encoder(kind: str, place: Path, ids: Tensor, oracle: Path) -> str:
    """What is said of an encoder: how far the last hidden states of its file are from transformers' of the checkpoint."""
    source, whole = checkpoint(kind, place / kind, MODEL), place / f"{kind}.gguf"
    convert(source, whole)
    wanted = AutoModel.from_pretrained(source, dtype=torch.float32).eval()(ids).last_hidden_state[0]
    ours = load(whole)(ids).last_hidden_state[0]
    theirs = torch.tensor(answers([{"file": str(whole), "embed": ids.tolist()}], oracle)[0]["embedded"][0])
    apart, further = (float((found - wanted).abs().max()) for found in (ours, theirs))
    return f"{kind}: ours differs by {apart:.1e}, llama.cpp's by {further:.1e} at most (values up to {wanted.abs().max():.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [row.kind for row in ARCHITECTURES.values() if row.causal or row.rotary]
    parser.add_argument("--kinds", default=",".join([*kinds, *FORMS]))
    parser.add_argument("--scheme", default="q4_k_m")
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        meant: dict[Path, Tensor] = {}
        ids = torch.randint(2, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        for kind in args.kinds.split(","):
            try:
                if made_by(kind) is AutoModel:
                    print(encoder(kind, Path(place), ids, args.oracle), flush=True)
                    continue
                meant |= files_of(kind, Path(place), ids, args.scheme)
            except (InputError, ValueError) as error:
                print(f"{kind}: {error}", flush=True)
        jobs = [{"file": str(file), "prompts": ids.tolist()} for file in meant]
        for (file, wanted), found in zip(meant.items(), answers(jobs, args.oracle), strict=True):
            if "error" in found:
                print(f"{file.stem}: llama.cpp does not load it")
                continue
            theirs = torch.tensor([found["logprobs"][0].get(str(i), float("nan")) for i in range(len(wanted))])
            print(
                f"{file.stem}: llama.cpp's differs by {float((theirs - wanted).abs().nanmean()):.1e} on average",
                flush=True,
            )


if __name__ == "__main__":
    main()
