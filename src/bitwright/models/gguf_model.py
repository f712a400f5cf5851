"""What of a checkpoint a GGUF file holds: the text model, and no multipliers.

llama.cpp has the parts for images and sound in a file of its own (mmproj). A text model within a multimodal one is taken as if
its checkpoint were its own.
"""

import re
from copy import deepcopy
from dataclasses import replace

from transformers import PretrainedConfig

from bitwright.files.checkpoint import Checkpoint
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.models.multipliers import fold_multipliers, without_multipliers

# How the text model's tensors begin in checkpoints of multimodal models, and what they are called in its own.
WITHIN = ((re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
          (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model."))  # fmt: skip
JOINED = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.attn\.Wqkv\.weight$")  # Nomic BERT's
OTHERS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|embed_vision|embed_audio)\."
)


def config_for_gguf(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text model, with multipliers folded; FormatError as of `without_multipliers`."""
    return without_multipliers(_text(config) or config)


def fit_to_gguf(config: PretrainedConfig, checkpoint: Checkpoint) -> list[str]:
    """Leave a checkpoint's text model in its table of tensors, under its own names, and multipliers folded.

    config: the checkpoint's own. Gives what there is to say of it.
    """
    text, said = _text(config), list[str]()
    if text is not None:
        others = [name for name in checkpoint.tensors if OTHERS.match(name)]
        checkpoint.tensors = {_own(name): info for name, info in checkpoint.tensors.items() if not OTHERS.match(name)}
        if others:
            what = f"{len(others)} tensors for images or sound, such as {others[0]}, are left out"
            said = [f"{what}: llama.cpp has them in a file of their own (mmproj), which its converter makes"]
    fold_multipliers(text or config, checkpoint)
    if config.model_type == "nomic_bert":
        _cut_apart(checkpoint)
    return said


def _cut_apart(checkpoint: Checkpoint) -> None:
    """Leave queries, keys and values of an encoder in the table, for the tensor that has them one after the other."""
    for name, info in list(checkpoint.tensors.items()):
        found = JOINED.search(name)
        if found is not None and info.shape[0] % 3 == 0:
            del checkpoint.tensors[name]
            shape, size = (info.shape[0] // 3, *info.shape[1:]), info.nbytes // 3
            for i, leaf in enumerate("qkv"):
                part = replace(info, offset=info.offset + i * size, shape=shape)
                checkpoint.tensors[f"layers.{found[1]}.self_attn.{leaf}_proj.weight"] = part


def _text(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of the text model within a multimodal one that llama.cpp has; None: the model is not multimodal."""
    text = config.get_text_config(decoder=True)
    if text is config or config.model_type in ARCHITECTURES or text.model_type not in ARCHITECTURES:
        return None
    found = deepcopy(text)
    found.tie_word_embeddings, found.architectures = config.tie_word_embeddings, None
    found.name_or_path = config.name_or_path
    return found


def _own(name: str) -> str:
    """A tensor's name in the text model's own checkpoint."""
    return next((begin.sub(own, name) for begin, own in WITHIN if begin.match(name)), name)
