"""Detect checkpoints whose config ties the output head to the embedding, but whose files hold a different head.

transformers ties the two only if they are equal, so the separate head is the one that counts.
"""

from functools import lru_cache
from pathlib import Path

from bitwright.files.checkpoint import Checkpoint, TensorInfo, disk_errors

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
AT_ONCE = 1 << 22  # bytes compared at a time


def has_own_head(folder: Path) -> bool:
    """Whether the files hold an output head that differs from the embedding. CheckpointError for damaged files."""
    if not any(folder.glob("*.safetensors")):
        return False
    checkpoint = Checkpoint(folder)
    plain = {name: name.removeprefix("language_model.") for name in checkpoint.tensors}
    heads = [name for name in plain if _is_head(plain[name].split(".")) and not name.endswith(".bias")]
    embedding = next((name for name in checkpoint.tensors if name.endswith(EMBEDDINGS)), None)
    if not heads or embedding is None:
        return False
    a, b = checkpoint.tensors[heads[0]], checkpoint.tensors[embedding]
    if len(heads) > 1 or not heads[0].endswith(".weight"):
        return True  # the head is quantized: several tensors, codes and scales
    marks = tuple((info.file, info.file.stat().st_mtime_ns) for info in (a, b))
    return _differ(a, b, marks)


def _is_head(parts: list[str]) -> bool:
    """Whether a tensor, by the parts of its name, is of the output matrix; RoBERTa's lm_head has further layers before it."""
    return parts[0] in HEADS and (len(parts) == 2 or parts[1] == "weight")


@lru_cache(maxsize=8)
def _differ(a: TensorInfo, b: TensorInfo, marks: object) -> bool:
    """Whether the bytes of two tensors differ. marks: files and modification times, part of the cache's key."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return True
    with disk_errors(a.file), a.file.open("rb") as first, b.file.open("rb") as second:
        first.seek(a.offset)
        second.seek(b.offset)
        for at in range(0, a.nbytes, AT_ONCE):
            size = min(AT_ONCE, a.nbytes - at)
            if first.read(size) != second.read(size):
                return True
    return False
