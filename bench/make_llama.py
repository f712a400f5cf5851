"""Make a Llama with random weights, a block at a time, so that making it needs no more memory than quantizing it.

    python -m bench.make_llama OUT --size 29m|1b [--blocks N]

Its tokenizer is the built-in model's.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from bitwright.cli.demo import MODEL
from bitwright.files.checkpoint import INDEX, write_shard

SIZES = {
    "29m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 4096},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip


def block(c: dict[str, int], i: int) -> dict[str, torch.Tensor]:
    """One block's tensors, as deviations of 0.02 give them."""
    h, m = c["hidden_size"], c["intermediate_size"]
    kv = h // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
    }
    tensors = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    norms = {name: torch.ones(h, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{i}.{name}.weight": t for name, t in {**tensors, **norms}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--blocks", type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    c = {**SIZES[args.size]}
    c["num_hidden_layers"] = args.blocks or c["num_hidden_layers"]
    args.out.mkdir(parents=True)
    h, v = c["hidden_size"], c["vocab_size"]
    outside = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h)}
    last = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in outside.items()}
    last["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    for i in range(c["num_hidden_layers"] + 1):
        tensors = block(c, i) if i < c["num_hidden_layers"] else last
        name = f"model-{i + 1:05d}-of-{c['num_hidden_layers'] + 1:05d}.safetensors"
        write_shard(args.out / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (args.out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **c,
    }
    (args.out / "config.json").write_text(json.dumps(config))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, args.out)


if __name__ == "__main__":
    main()
