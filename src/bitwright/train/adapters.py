"""Prepare a quantized model for training LoRA adapters on it (QLoRA, arXiv:2305.14314)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from bitwright.inference.dense import Dense
from bitwright.inference.lookup import Lookup, Table
from bitwright.inference.qlinear import QLinear
from bitwright.models.layers import is_norm


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Prepare a model from `bitwright.load` for peft's `get_peft_model`, in place; returns the same model.

    All parameters are frozen, norms are converted to float32, and the embedding's output requires gradients, as gradient
    checkpointing needs. An embedding of packed rows is decoded, so that adapters can be beside it, or train it whole. Behind
    such norms activations are float32, to which an adapter can add less than 16 bits would show; so layers are told to
    multiply in the type that the model was loaded in: bfloat16, where processors have it, is several times as fast. Logits, to
    which none is added, stay in it.
    gradient_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
    """
    model.requires_grad_(False)
    loaded_in, head = model.dtype, model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, QLinear | Dense):
            module.multiplies_in = loaded_in
        if is_norm(module) and not isinstance(module, nn.Linear):
            module.float()
    if isinstance(head, Dense):
        head.gives = loaded_in
    _float_embedding(model)
    model.enable_input_require_grads()
    if gradient_checkpointing:
        with renamed():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _float_embedding(model: PreTrainedModel) -> None:
    """Decode the model's embedding, where its rows are packed, or of another type."""
    lookup = model.get_input_embeddings()
    if isinstance(lookup, Lookup):
        model.set_input_embeddings(Table(lookup.weight, lookup.scale))


@contextmanager
def renamed() -> Iterator[None]:
    """Within this context, transformers does not warn of its new names for gradient checkpointing, which 5.0 has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield
