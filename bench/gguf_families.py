"""Each architecture of GGUF: a small random checkpoint made a file; its logprobs must be transformers' and llama.cpp's.

    python -m bench.gguf_families [--kinds granite,olmo2] [--oracle PYTHON]

A line an architecture: how far the logprobs that our reader computes from the file are from transformers' on the checkpoint,
and those that llama.cpp computes from the same file; float32 all. Needs `bench/peers/install.sh xllamacpp`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gguf_pretokenizers import ORACLE, answers
from bitwright.cli.demo import MODEL
from bitwright.errors import InputError
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert

SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "initializer_range": 0.2,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16, "sliding_window": 8},
    "gemma": {"head_dim": 16}, "qwen3": {"head_dim": 16}, "seed_oss": {"head_dim": 16},
    "glm4": {"head_dim": 16}, "ernie4_5": {"head_dim": 16}, "cohere2": {"sliding_window": 8, "logit_scale": 0.25},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo": {"clip_qkv": 4.0}, "gpt_neox": {"num_key_value_heads": None}, "qwen3_moe": {"head_dim": 16, **MIXTURE},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
PROMPT = 24  # tokens


def checkpoint(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a kind, with a tokenizer."""
    torch.manual_seed(0)
    options = {key: value for key, value in {**SIZES, **CHANGES.get(kind, {})}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@torch.no_grad()
def expected(folder: Path, ids: Tensor) -> Tensor:
    """transformers' logprobs behind a prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids).logits[0, -1].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(row.kind for row in ARCHITECTURES.values() if row.causal))
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        jobs, meant = [], {}
        ids = torch.randint(2, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        for kind in args.kinds.split(","):
            file = Path(place, f"{kind}.gguf")
            try:
                source = checkpoint(kind, Path(place, kind), MODEL)
                convert(source, file)
                streamed = StreamedModel(file)
                mine = streamed.head(torch.cat(streamed.hidden(ids)))[0, -1].log_softmax(-1)
            except (InputError, ValueError) as error:
                print(f"{kind}: {error}", flush=True)
                continue
            meant[kind] = expected(source, ids)
            print(f"{kind}: ours differs by {float((mine - meant[kind]).abs().max()):.1e}", flush=True)
            jobs.append({"file": str(file), "prompts": ids.tolist()})
        for (kind, wanted), found in zip(meant.items(), answers(jobs, args.oracle), strict=True):
            if "error" in found:
                print(f"{kind}: llama.cpp does not load it")
                continue
            theirs = torch.tensor([found["logprobs"][0].get(str(i), float("nan")) for i in range(len(wanted))])
            print(
                f"{kind}: llama.cpp's differs by {float((theirs - wanted).abs().nanmean()):.1e} on average", flush=True
            )


if __name__ == "__main__":
    main()
