"""Fold a model's multipliers of activations into the matrices beside them, for files that have no place for multipliers.

Falcon-H1 multiplies what goes into and comes out of its parts by constants of its config. GGUF has no keys for them: the
matrices of a file are multiplied, as llama.cpp's converter does it (conversion/falcon_h1.py). A product is rounded to the
checkpoint's own type.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Checkpoint

ONES = (
    "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier", "attention_out_multiplier",
    "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip
LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}


def without_multipliers(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model with its multipliers folded in; the same config for all other models.

    FormatError where the embedding and the output head, one matrix, have different ones.
    """
    if config.model_type != "falcon_h1":
        return config
    if config.tie_word_embeddings and config.embedding_multiplier != config.lm_head_multiplier:
        message = "the embedding and the output head are one matrix, and each has a multiplier of its own"
        raise FormatError(message, where="config.json", remedy="keep this model in another format")
    found = deepcopy(config)
    for name in ONES:
        setattr(found, name, 1.0)
    for name, length in LISTS.items():
        setattr(found, name, [1.0] * length)
    return found


def fold_multipliers(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Multiply a checkpoint's matrices as they are read. config: its own, with the multipliers."""
    if config.model_type != "falcon_h1":
        return
    factors = _factors(config)
    for name, info in checkpoint.tensors.items():
        factor = next((factor for end, factor in factors.items() if name.endswith(end)), None)
        if factor is not None:
            checkpoint.tensors[name] = replace(info, stored=info.shape, take=_times(factor))


def _times(factor: float | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda w: (w.float() * factor).to(w.dtype)


def _factors(config: PretrainedConfig) -> dict[str, float | Tensor]:
    """What the matrices of such names are multiplied by; a Tensor [N, 1]: each row by its own."""
    into = config.attention_in_multiplier
    gate, down = config.mlp_multipliers
    states = config.mamba_n_groups * config.mamba_d_state
    sizes = (config.mamba_d_ssm, config.mamba_d_ssm, states, states, config.mamba_n_heads)  # z, x, B, C, dt
    rows = torch.cat([torch.full((n, 1), m) for n, m in zip(sizes, config.ssm_multipliers, strict=True)])
    return {
        "self_attn.q_proj.weight": into, "self_attn.k_proj.weight": into * config.key_multiplier,
        "self_attn.v_proj.weight": into, "self_attn.o_proj.weight": config.attention_out_multiplier,
        "mamba.in_proj.weight": config.ssm_in_multiplier * rows, "mamba.out_proj.weight": config.ssm_out_multiplier,
        "feed_forward.gate_proj.weight": gate, "feed_forward.down_proj.weight": down,
        "embed_tokens.weight": config.embedding_multiplier, "lm_head.weight": config.lm_head_multiplier,
    }  # fmt: skip
