"""Models by their name on the Hugging Face hub: taken from huggingface_hub's cache, or downloaded into it.

    org/name, org/name@revision       a checkpoint; revision: a branch, tag or commit
    org/name:FILE.gguf                a GGUF file of that repository, with all its parts if it is split

A path that exists is always the path. huggingface_hub's own settings count: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bitwright.errors import CheckpointError

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:]+))?(:(?P<file>.+\.gguf))?")
# Of a repository: configs, weights, tokenizers, processors, chat templates, and what results keep: licence and card.
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
# Weights in other layouts (original/, onnx/, Mistral's consolidated file); of directories only the chat templates are read.
UNWANTED = ("*/*.json", "*/*.safetensors", "*/*.model", "*/*.txt", "*/README.md", "consolidated*")
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOWERS = ("vision_config", "audio_config")


@dataclass(frozen=True)
class HubName:
    """A name on the hub, as this module's docstring has it; file: "" for a whole checkpoint."""

    repo: str
    revision: str | None
    file: str

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Parse a name; None if it cannot be one."""
        found = NAME.fullmatch(text)
        return None if found is None else cls(found["repo"], found["revision"], found["file"] or "")

    @property
    def patterns(self) -> Sequence[str]:
        """Patterns of the files that are needed."""
        if not self.file:
            return WANTED
        return [PART.sub(r"-*-of-\1.gguf", glob.escape(self.file))]

    def within(self, snapshot: Path) -> Path:
        """The directory or file that was named, in a snapshot of the repository."""
        return snapshot / self.file if self.file else snapshot

    def is_complete(self, snapshot: Path) -> bool:
        """Whether a snapshot in the cache holds all that is needed; others may have put there only what they needed."""
        if self.file:
            count = PART.search(self.file)
            parts = len(list(snapshot.glob(self.patterns[0])))
            return self.within(snapshot).is_file() and parts >= (int(count[1]) if count else 1)
        if not self.has_weights(snapshot):
            return False
        there = {file.name for file in snapshot.iterdir()}
        config = (snapshot / "config.json").read_text(encoding="utf-8")
        has_tower = any(f'"{tower}"' in config for tower in TOWERS)
        return all(there.intersection(some) for some in (TOKENIZERS, *([PROCESSORS] if has_tower else [])))

    def has_weights(self, snapshot: Path) -> bool:
        """Whether a snapshot holds a config and all weights: then it can be used, though its tokenizer may be missing."""
        from bitwright.files.checkpoint import weight_files  # imports torch, which a refusal does without

        if self.file:
            return self.is_complete(snapshot)
        try:
            weight_files(snapshot)
        except CheckpointError:
            return False
        return (snapshot / "config.json").is_file()


def local(model: Path) -> Path:
    """Where a model lies on this machine: the path itself, or for a name on the hub its files in the cache.

    A revision in the cache is used as it is, and no network asked. What is missing is downloaded, with huggingface_hub's
    progress bars on stderr. A path that neither exists nor can be a name is given back, for those who open it to refuse.
    CheckpointError if it is neither here, nor in the cache, nor to be had: unknown, private, gated, or no network.
    """
    name = HubName.of(model.as_posix())
    if model.exists() or name is None:
        return model
    cached = _cached(name)
    if cached is not None and name.is_complete(cached):
        return name.within(cached)
    try:
        snapshot = _downloaded(name)
    except CheckpointError:
        if cached is None or not name.has_weights(cached):
            raise
        snapshot = cached
    if not name.has_weights(snapshot) and not (snapshot / "adapter_config.json").is_file():
        raise _unusable(name, snapshot)
    return name.within(snapshot)


def _cached(name: HubName) -> Path | None:
    """The revision's snapshot in the cache, complete or not; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # no patterns: whether all is there is for `is_complete` to say
        found = snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def _downloaded(name: HubName) -> Path:
    """The revision's snapshot with all files that are needed, from the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures: Any = (*HfHubHTTPError.__bases__, HFValidationError)  # OSError, and the HTTP client's own error
    try:
        folder = snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=list(name.patterns),
            ignore_patterns=None if name.file else list(UNWANTED),
        )
    except failures as error:
        raise _refusal(name, error) from error
    return Path(folder)


def _refusal(name: HubName, error: Exception) -> CheckpointError:
    """What to say of a download that failed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    nowhere, path = "no such file or directory here", "give a path that exists"
    if isinstance(error, LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        message = f"{nowhere}, no model of this name in the cache ({constants.HF_HUB_CACHE}), and {why}"
        remedy = f"{path}, or download it where there is a network: {_download(name)}"
    elif isinstance(error, GatedRepoError):
        message = f"{nowhere}, and the model of this name on the hub is gated"
        remedy = f"{path}, or accept its terms at {constants.ENDPOINT}/{name.repo}, then: hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        message = f"{nowhere}, and the hub knows no model of this name, or it is private"
        remedy = f"{path}, check the name, or for a private model: hf auth login"
    elif isinstance(error, RevisionNotFoundError):
        message = f"the hub has no revision {name.revision!r} of this model"
        remedy = f"give a branch, tag or commit that {constants.ENDPOINT}/{name.repo} lists"
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{nowhere}, and the download failed: {reason}"
        remedy = f"{path}, or run it again: the download goes on where it stopped"
    return CheckpointError(message, where=_shown(name), remedy=remedy)


def _unusable(name: HubName, snapshot: Path) -> CheckpointError:
    """What to say of a repository without the files that are needed."""
    where = _shown(name)
    if name.file:
        remedy = f"give a file that the repository lists, such as {name.repo}:FILE.gguf"
        return CheckpointError("the repository has no such GGUF file, or not all its parts", where=where, remedy=remedy)
    lacking = "config.json" if not (snapshot / "config.json").is_file() else "complete weights in safetensors"
    message = f"its snapshot in the cache has no {lacking}, and the hub gave none"
    remedy = (
        f"a GGUF file is named as {name.repo}:FILE.gguf; pickled weights are never opened; without a network, "
        f"download it where there is one: {_download(name)}"
    )
    return CheckpointError(message, where=where, remedy=remedy)


def _download(name: HubName) -> str:
    """The command that puts a model into the cache."""
    parts = ("hf download", name.repo, name.file, f"--revision {name.revision}" if name.revision else "")
    return " ".join(part for part in parts if part)


def _shown(name: HubName) -> str:
    """The name as it is written."""
    return name.repo + (f"@{name.revision}" if name.revision else "") + (f":{name.file}" if name.file else "")


def name_of(folder: Path) -> str | None:
    """The name on the hub of a snapshot in huggingface_hub's cache: org/name; None for any other directory."""
    found = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    return f"{found[1]}/{found[2]}" if found and folder.parent.name == "snapshots" else None
