"""Prepare a quantized model for training LoRA adapters on it (QLoRA, arXiv:2305.14314)."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.inference.dense import Dense
from bitwright.inference.lookup import Lookup, Table
from bitwright.inference.qlinear import QLinear
from bitwright.models.experts import Experts

# peft's functions that make those of transformers 4 of targets and states, for models whose experts it fused since
CONVERSIONS = ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers")


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Prepare a model from `bitwright.load` for peft's `get_peft_model`, in place; returns the same model.

    All parameters are frozen; norms, routers of experts and whatever else of the text model is no matrix of a Linear are
    converted to float32; the embedding's output requires gradients, as gradient checkpointing needs. An embedding of packed
    rows is decoded, so that adapters can be beside it, or train it whole. Its output and all activations are float32, to which
    an adapter can add less than 16 bits would show; so layers are told to multiply in the type that the model was loaded in:
    bfloat16, where processors have it, is several times as fast. Logits, to which none is added, stay in it.
    gradient_checkpointing: recompute the blocks' activations in the backward pass, to save memory.
    """
    model.requires_grad_(False)
    loaded_in, head = model.dtype, model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, QLinear | Dense):
            module.multiplies_in = loaded_in
    for module in model.get_decoder().modules():
        if not isinstance(module, QLinear | Dense | Lookup | nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    if isinstance(head, Dense):
        head.gives = loaded_in
    _leave_experts_apart()
    _float_embedding(model)
    model.get_input_embeddings().register_forward_hook(_given_in_float32)
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


def _given_in_float32(_: nn.Module, ids: Any, rows: Tensor) -> Tensor:
    """A hook: an embedding's rows in float32, which norms of Gemma's kind then keep."""
    return rows.float()


def _leave_experts_apart() -> None:
    """Let peft take modules as it finds them where each expert has its own: it would look for transformers' fused parameters
    in their place, find none, and train no expert."""
    # There is no public way around: peft converts by the config's model_type alone, before it reads target_parameters or looks
    # up custom modules; to unregister transformers' conversion of that type would break from_pretrained in this process.
    if find_spec("peft") is None or find_spec("peft.utils.transformers_weight_conversion") is None:
        return
    from peft.utils import transformers_weight_conversion as conversion

    for name in CONVERSIONS:
        convert = getattr(conversion, name, None)
        if convert is not None and not hasattr(convert, "__wrapped__"):
            setattr(conversion, name, _unless_apart(convert))


def _unless_apart(convert: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion of peft's that leaves configs and states for models of bitwright's experts as they are."""

    @wraps(convert)
    def converted(*args: Any, model: nn.Module, **others: Any) -> Any:
        if any(isinstance(module, Experts) for module in model.modules()):
            return others.get("adapter_state_dict")
        return convert(*args, model=model, **others)

    return converted


@contextmanager
def renamed() -> Iterator[None]:
    """Within this context, transformers does not warn of its new names for gradient checkpointing, which 5.0 has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield
