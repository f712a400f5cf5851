"""Which of transformers' classes makes a model of a config, and how that takes no memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitwright.gguf.config_keys import first_position

# Which predict no next token: their last hidden state is what they are for.
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")


def model_of(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with random weights, not training; an encoder without its pooling layer."""
    if config.model_type == "distilbert":  # which has no pooling layer
        found = AutoModel.from_config(config, dtype=dtype)
    elif config.model_type in ENCODERS:
        found = AutoModel.from_config(config, dtype=dtype, add_pooling_layer=False)
    else:
        found = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return found.eval()


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
