"""Check that the model reads every tensor of a checkpoint: an error names the others, except those that may be ignored."""

import re
from collections.abc import Iterable, Mapping

from bitwright.errors import CheckpointError
from bitwright.gguf.tensor_names import is_unused
from bitwright.models.kv_cache import SCALES
from bitwright.models.skeleton import Skeleton

Shapes = Mapping[str, tuple[int, ...] | None]
COMPUTED = "the model computes it"
MTP = "multi-token prediction: no part of predicting the next token"
PASSED_OVER = "transformers leaves it unread on purpose"
KV_SCALES = "a scale for keys and values, which config.json does not ask to round (kv_cache_scheme)"
SHOWN = 3  # names in an error

# Tensors that may be ignored: pattern of the name -> (numbers of dimensions that it may have, empty: any; the reason).
MAY_BE_LEFT: dict[str, tuple[tuple[int, ...], str]] = {
    r"(^|\.)rotary_emb\.(original_)?inv_freq$": ((1,), COMPUTED),
    r"(^|\.)rotary_emb\.(cos|sin)_cached$": ((2, 4), COMPUTED),
    r"(^|\.)position_ids$": ((1, 2), COMPUTED),
    r"(^|\.)(attn|attention)\.bias$": ((2, 4), COMPUTED),  # GPT-2's causal mask
    r"(^|\.)(attn|attention)\.masked_bias$": ((0, 1), COMPUTED),
    r"(^|\.)attn\.causal_mask$": ((2, 4), COMPUTED),  # CodeGen's
    r"^(model\.|language_model\.|model\.language_model\.)?mtp(_[a-z]+)?\.": ((), MTP),
    r"\.(self_attn|attention|attn)(\.attn)?\.(q|k|v|kv|prob)_scale$": ((0, 1), KV_SCALES),
    r"\.(k|v|qkv)_proj\.(k|v|output)_scale$": ((0, 1), KV_SCALES),  # AutoFP8's place for them
}


def why_left(name: str, shape: tuple[int, ...] | None, skeleton: Skeleton) -> str | None:
    """The reason why a tensor that the model does not read may be ignored; None if it may not."""
    if not skeleton.predicts and is_unused(name):
        return "the pooling layer or a head"
    if _beyond_depth(name, skeleton):
        return MTP
    for pattern, (axes, reason) in MAY_BE_LEFT.items():
        if re.search(pattern, name) and (not axes or (shape is not None and len(shape) in axes)):
            return reason
    return PASSED_OVER if skeleton.is_passed_over(name) else None


def _beyond_depth(name: str, skeleton: Skeleton) -> bool:
    """Whether a tensor is of a multi-token prediction block, stored after the last decoder block (DeepSeek V3, GLM-4-MoE)."""
    further = getattr(skeleton.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    found = re.match(rf"(model\.)?{re.escape(skeleton.block_prefix.removeprefix('model.'))}\.(\d+)\.", name)
    return found is not None and len(skeleton) <= int(found[2]) < len(skeleton) + further


def check_all_read(shapes: Shapes, read: Iterable[str], skeleton: Skeleton, where: str) -> None:
    """CheckpointError for tensors (name -> shape) that are neither in `read` nor may be ignored."""
    read = {*read, *(source for conversion in skeleton.conversions for source in conversion.sources)}
    found = [name for name, shape in shapes.items() if name not in read and why_left(name, shape, skeleton) is None]
    if found:
        raise unread(found, skeleton, where)


def notes_on_scales(shapes: Shapes, skeleton: Skeleton, *, rounded: bool) -> tuple[str, ...]:
    """A note on scales for keys, values or queries that are not used; rounded: whether config.json has a kv_cache_scheme."""
    found = [name for name, shape in shapes.items() if why_left(name, shape, skeleton) == KV_SCALES]
    left = [name for name in found if not (rounded and name.endswith(SCALES))]
    if not left:
        return ()
    asks = "k_scale and v_scale alone" if rounded else "none, so keys and values stay in float"
    shown = f"{len(left)} scales for keys and values, such as" if len(left) > 1 else "a scale for keys and values,"
    return (f"not used: {shown} {left[0]}; config.json (kv_cache_scheme) asks for {asks}",)


def unread(names: list[str], skeleton: Skeleton, where: str) -> CheckpointError:
    """The error for tensors in the files that the model does not have."""
    remedy = "config.json and weights must belong together"
    if not skeleton.predicts:
        remedy = "encoders are taken for their hidden states: save this one without its head, as AutoModel has it"
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    if len(names) == 1:
        return CheckpointError(f"the model has no tensor {shown}, so nothing would read it", where=where, remedy=remedy)
    some = f"such as {shown}" if len(names) > SHOWN else shown
    return CheckpointError(
        f"the model has no place for {len(names)} tensors, so nothing would read them: {some}",
        where=where,
        remedy=remedy,
    )
