"""Model families: which transformers class builds a config's model, and how to build it without memory for weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from bitwright.errors import CheckpointError
from bitwright.gguf.config_keys import first_position

# Encoders: they predict no next token, their output is the last hidden state.
POOLED = ("bert", "roberta", "xlm-roberta")  # those that have a pooling layer
ENCODERS = (*POOLED, "distilbert", "modernbert", "eurobert", "nomic_bert")


# Linear modules that stay in float unless a recipe names them, because they are small and sensitive: pattern of the name ->
# reason. Some models read such a weight without calling the module.
KEPT_LINEARS = {
    r"\.dt_proj$": "the step size of a state space",
    r"\.(in_proj_ba|in_proj_a|in_proj_b)$": "the step size and decay of a state",
    r"\.altup\.\w+$": "mixes the few streams of the hidden state",
}
# model_types whose forward mixes float32 in, whatever the weights are: calibrated in float32 on every processor.
IN_FLOAT32 = ("xlstm",)
# What configs call the number of a layer's experts, and of those that a token is sent to.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
# Auto classes of models that predict a next token, in the order in which they are tried.
PREDICTING = {
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": MODEL_FOR_MULTIMODAL_LM_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
}
# model_types whose classes access the weights of linear modules directly, so that transformers must decompress them on loading.
DECOMPRESSED = (
    "falcon", "falcon_mamba", "gpt_bigcode", "mamba", "mamba2", "modernbert", "modernbert-decoder", "nanochat",
    "recurrent_gemma", "rwkv", "xlstm",
)  # fmt: skip


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model predicts no next token; of Gemma 3, one with attention both ways (EmbeddingGemma)."""
    both_ways = config.model_type == "gemma3_text" and config.use_bidirectional_attention
    return config.model_type in ENCODERS or bool(both_ways)


def model_of(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A config's model with random weights, in eval mode; an encoder without its pooling layer.

    A multimodal model includes its vision and audio towers. ValueError for a model that neither is an encoder
    nor predicts a next token; CheckpointError as of `check_experts_used`.
    """
    check_experts_used(config)
    if config.model_type in POOLED:
        found = AutoModel.from_config(config, dtype=dtype, add_pooling_layer=False)
    elif is_encoder(config):
        found = AutoModel.from_config(config, dtype=dtype)
    else:
        found = class_of(config)._from_config(config, dtype=dtype)
    return found.eval()


def check_experts_used(config: PretrainedConfig) -> None:
    """CheckpointError for a token's experts that are none, or more than a layer has."""
    text = config.get_text_config()
    (count, experts), (used, wanted) = (
        next(((name, n) for name in names if isinstance(n := getattr(text, name, None), int)), ("", 0))
        for names in (EXPERTS, EXPERTS_USED)
    )
    if experts and used and not 0 < wanted <= experts:
        message = f"{used} = {wanted}, and {count} = {experts}: each token must have 1 to {experts} experts"
        where, remedy = (
            str(config.name_or_path or config.model_type),
            f"set {used} in config.json as the model was trained",
        )
        raise CheckpointError(message, where=where, remedy=remedy)


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class of a config: the one named in `architectures` if it predicts tokens, else transformers' default.

    ValueError for encoder-decoder models, and those that predict no next token.
    """
    known = [mapping[type(config)] for mapping in PREDICTING.values() if type(config) in mapping]
    if not known or config.is_encoder_decoder:
        kind = "is an encoder and a decoder" if known else "predicts no next token"
        raise ValueError(f"a model of type {config.model_type!r} {kind}")
    named = config.architectures or []
    return next((one for one in known if one.__name__ in named), known[0])


def auto_class(config: PretrainedConfig) -> str:
    """The name of the transformers Auto class that loads a config's model."""
    if is_encoder(config):
        return "AutoModel"
    made = class_of(config)
    return next(
        name for name, mapping in PREDICTING.items() if type(config) in mapping and mapping[type(config)] is made
    )


def positions_of(config: PretrainedConfig) -> int | None:
    """The model's maximum context length in tokens; None if it is not limited."""
    most = getattr(config, "max_position_embeddings", None)
    return most - first_position(config) if most and most > 0 else None  # XLNet's -1 is no limit


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within this context, modules get parameters on the meta device; buffers (rotary frequencies, masks) are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a tied one arrives on meta: it stays the same object
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
