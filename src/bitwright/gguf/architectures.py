"""The architectures that transformers and llama.cpp both know: which attribute of one's config is which key of the other.

Rows are read in both directions, by config_keys.py; neither library is needed to look a name up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import CheckpointError

SHAPE = (
    ("max_position_embeddings", "context_length"), ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"), ("num_attention_heads", "attention.head_count"),
)  # fmt: skip
GROUPED = (*SHAPE, ("num_key_value_heads", "attention.head_count_kv"))
RMS = (("rms_norm_eps", "attention.layer_norm_rms_epsilon"),)
HEADS = (("head_dim", "attention.key_length"), ("head_dim", "attention.value_length"))
LLAMA = (*GROUPED, *RMS, *HEADS, ("vocab_size", "vocab_size"))
SLIDING = (("sliding_window", "attention.sliding_window"),)
GEMMA = (*GROUPED, *RMS, *HEADS)
SOFT_CAPS = (
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
GPT2 = (
    ("n_positions", "context_length"), ("n_embd", "embedding_length"), ("n_layer", "block_count"),
    ("n_head", "attention.head_count"), ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
)  # fmt: skip
NORM = (("layer_norm_eps", "attention.layer_norm_epsilon"),)
DISTILLED = (
    ("max_position_embeddings", "context_length"), ("dim", "embedding_length"), ("n_layers", "block_count"),
    ("hidden_dim", "feed_forward_length"), ("n_heads", "attention.head_count"),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A row of the table. `kind`: transformers' model_type; `name`: llama.cpp's architecture.

    keys     (config attribute, key without the architecture's prefix), both ways
    rotary   whether positions are rotary; pairs: whether q's and k's rows are turned, so that pairs are neighbours
    shifted  whether norms are stored as 1 + w
    causal   whether it predicts the next token; else it is an encoder, of which llama.cpp gives the last hidden state
    padded   whether positions count from behind the padding token's id
    """

    kind: str
    name: str
    keys: tuple[tuple[str, str], ...]
    rotary: bool = True
    pairs: bool = False
    shifted: bool = False
    causal: bool = True
    padded: bool = False


OTHERS = {  # what general.type says of files that are no models, and what to do with them
    "adapter": ("a LoRA adapter", "merge it into its model, and give that; llama.cpp takes both, as -m and --lora"),
    "imatrix": ("an importance matrix", "give it as --calib, and a model's file"),
}
VISION = "clip"  # of mmproj files: what sees, without the model that it sees for

ARCHITECTURES = {
    row.kind: row
    for row in (
        Architecture("llama", "llama", LLAMA, pairs=True),
        Architecture("mistral", "llama", LLAMA, pairs=True),
        Architecture("qwen2", "qwen2", (*GROUPED, *RMS)),
        Architecture("qwen3", "qwen3", (*GROUPED, *RMS, *HEADS)),
        Architecture("phi3", "phi3", (*GROUPED, *RMS, *SLIDING)),
        Architecture("gemma", "gemma", GEMMA, shifted=True),
        Architecture("gemma2", "gemma2", (*GEMMA, *SOFT_CAPS, *SLIDING), shifted=True),
        Architecture("gemma3_text", "gemma3", (*GEMMA, SOFT_CAPS[1], *SLIDING), shifted=True),
        Architecture("gpt2", "gpt2", GPT2, rotary=False),
        Architecture("starcoder2", "starcoder2", (*GROUPED, ("norm_epsilon", "attention.layer_norm_epsilon"))),
        *(
            Architecture(kind, "bert", (*SHAPE, *NORM), rotary=False, causal=False, padded=kind != "bert")
            for kind in ("bert", "roberta", "xlm-roberta")
        ),
        Architecture("distilbert", "bert", DISTILLED, rotary=False, causal=False),
    )
}


def check_is_model(keys: Mapping[str, Any], where: str) -> None:
    """CheckpointError for a file that is something else than a model: an adapter, an importance matrix."""
    kind = keys.get("general.type", "model")
    if kind in OTHERS:
        what, remedy = OTHERS[kind]
        raise CheckpointError(f"a file of {what}, not a model", where=where, remedy=remedy)


def named(name: object) -> Architecture | None:
    """The first row of llama.cpp's architecture of that name; None if there is none."""
    return next((row for row in ARCHITECTURES.values() if row.name == name), None)
