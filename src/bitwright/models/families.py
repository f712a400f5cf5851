"""Which of transformers' classes makes a model of a config, and how that takes no memory."""

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

from bitwright.gguf.config_keys import first_position

# Which predict no next token: their last hidden state is what they are for.
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")


# Linear modules that stay in float unless a rule of the recipe names them, as they are small and steer a state: what they end
# with -> why. Models may read such a weight without calling the module.
KEPT_LINEARS = {
    r"\.dt_proj$": "the step size of a state space",
    r"\.(in_proj_ba|in_proj_a|in_proj_b)$": "the step size and decay of a state",
    r"\.altup\.\w+$": "mixes the few streams of the hidden state",
}
# Config classes of these mappings make models that predict a next token, the first that knows a config before the others.
PREDICTING = {
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "AutoModelForMultimodalLM": MODEL_FOR_MULTIMODAL_LM_MAPPING,
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
}
# Whose class reads or initialises weights of linear modules by itself, so that transformers must decompress them as it loads.
DECOMPRESSED = (
    "falcon", "falcon_mamba", "gpt_bigcode", "mamba", "mamba2", "modernbert-decoder", "nanochat", "recurrent_gemma",
)  # fmt: skip


def model_of(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with random weights, not training; an encoder without its pooling layer.

    Of a model with towers for images or sound all of it. ValueError for a config of no model that predicts tokens.
    """
    if config.model_type == "distilbert":  # which has no pooling layer
        found = AutoModel.from_config(config, dtype=dtype)
    elif config.model_type in ENCODERS:
        found = AutoModel.from_config(config, dtype=dtype, add_pooling_layer=False)
    else:
        found = class_of(config)._from_config(config, dtype=dtype)
    return found.eval()


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names in `architectures`, if it predicts tokens; else the one that transformers has for it."""
    known = [mapping[type(config)] for mapping in PREDICTING.values() if type(config) in mapping]
    if not known or config.is_encoder_decoder:
        kind = "is an encoder and a decoder" if known else "predicts no next token"
        raise ValueError(f"a model of type {config.model_type!r} {kind}")
    named = config.architectures or []
    return next((one for one in known if one.__name__ in named), known[0])


def auto_class(config: PretrainedConfig) -> str:
    """The name of the Auto class that loads such a model."""
    if config.model_type in ENCODERS:
        return "AutoModel"
    made = class_of(config)
    return next(
        name for name, mapping in PREDICTING.items() if type(config) in mapping and mapping[type(config)] is made
    )


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens the model has positions for; None: any number."""
    most = getattr(config, "max_position_embeddings", None)
    return most and most - first_position(config)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters registered meanwhile take no memory; buffers (rotary frequencies, masks) are computed for real."""
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
