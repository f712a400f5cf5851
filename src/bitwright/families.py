"""Which of transformers' classes makes a model of a config."""

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

ENCODERS = ("bert",)  # which predict no next token: their last hidden state is what they are for


def model_of(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with random weights, not training; an encoder without its pooling layer."""
    if config.model_type in ENCODERS:
        found = AutoModel.from_config(config, dtype=dtype, add_pooling_layer=False)
    else:
        found = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return found.eval()
