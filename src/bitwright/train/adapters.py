"""What a loaded model needs before adapters are trained beside its quantized weights (QLoRA, arXiv:2305.14314)."""

from torch import nn
from transformers import PreTrainedModel

from bitwright.models.skeleton import is_norm


def prepare_for_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Make a model of `bitwright.load` ready for peft's `get_peft_model`; the same model is given back.

    All of its parameters are frozen, norms are kept in float32, and what the embedding gives takes part in gradients, which
    checkpointing needs. gradient_checkpointing: blocks are run once more on the way back rather than remembered.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if is_norm(module) and not isinstance(module, nn.Linear):
            module.float()
    model.enable_input_require_grads()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
