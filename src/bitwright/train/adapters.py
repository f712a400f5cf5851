"""Prepare a quantized model for training LoRA adapters on it (QLoRA, arXiv:2305.14314)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from bitwright.models.layers import is_norm


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Prepare a model from `bitwright.load` for peft's `get_peft_model`, in place; returns the same model.

    All parameters are frozen, norms are converted to float32, and the embedding's output requires gradients, as gradient
    checkpointing needs. What blocks add up stays in float32; a model loaded in 16 bits multiplies in those, by torch.autocast:
    bfloat16, where processors have it, is several times as fast.
    gradient_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
    """
    model.requires_grad_(False)
    if model.dtype != torch.float32:
        model.forward = torch.autocast(model.device.type, model.dtype)(model.forward)
        model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded.float())
    for module in model.modules():
        if is_norm(module) and not isinstance(module, nn.Linear):
            module.float()
    model.enable_input_require_grads()
    if gradient_checkpointing:
        with renamed():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def renamed() -> Iterator[None]:
    """Within this context, transformers does not warn of its new names for gradient checkpointing, which 5.0 has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield
