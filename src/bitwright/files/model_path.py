"""What is named as a model: a directory or a GGUF file, told apart and refused without importing anything large."""

from pathlib import Path

from bitwright.errors import CheckpointError

MAGIC, SUFFIX = b"GGUF", ".gguf"
# What git leaves in place of a large file, and more bytes than that ever has.
POINTER, POINTER_BYTES = b"version https://git-lfs", 1024


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file: by its first bytes or its suffix; a file that does not exist by its suffix."""
    if not path.is_file():
        return path.suffix.lower() == SUFFIX and not path.is_dir()
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC or path.suffix.lower() == SUFFIX
    except OSError:
        return path.suffix.lower() == SUFFIX


def check_model_path(path: Path) -> None:
    """CheckpointError for what is neither a GGUF file nor a directory with a config.json, and for files that git left out."""
    pointer = next(filter(_is_pointer, sorted(path.iterdir()) if path.is_dir() else [path]), None)
    if pointer is not None:
        remedy = f"git lfs pull, in {pointer.parent}"
        raise CheckpointError("a pointer of git LFS, not the file itself", where=str(pointer), remedy=remedy)
    if path.is_file() and not is_gguf(path):
        message = "a file that is no GGUF file: its first four bytes are not 'GGUF'"
        raise CheckpointError(message, where=str(path), remedy="give a .gguf file, or a checkpoint's directory")
    if not path.exists():
        remedy = "give a directory, a .gguf file, or a name on the hub: org/name"
        raise CheckpointError("no such file or directory", where=str(path), remedy=remedy)
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise CheckpointError(
            "no config.json", where=str(path), remedy="give the directory of a Hugging Face checkpoint"
        )


def _is_pointer(path: Path) -> bool:
    """Whether git LFS has left a file's address in its place."""
    try:
        if not path.is_file() or path.stat().st_size > POINTER_BYTES:
            return False
        with path.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False
