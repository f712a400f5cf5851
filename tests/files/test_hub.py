"""Models by their name on the hub: from a cache laid out as huggingface_hub has it, and without a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

import bitwright
from bitwright.cli.app import app
from bitwright.errors import CheckpointError
from bitwright.files.hub import HubName, local, name_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a hub that refuses connections."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "hub"
    assert not list(tmp_path.rglob("*.incomplete"))


def cached(cache: Path, repo: str, files: list[Path], revision: str = "main") -> Path:
    """Put files into the cache as huggingface_hub does: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    for i, file in enumerate(files):
        shutil.copy(file, root / "blobs" / f"{i:040x}")
        (root / "snapshots" / COMMIT / file.name).symlink_to(Path("../../blobs") / f"{i:040x}")
    return root / "snapshots" / COMMIT


def run(*words: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_cached_model_is_taken_by_name_by_every_command(cache: Path, llama: Path, tmp_path: Path, text: str) -> None:
    snapshot = cached(cache, "org/tiny", sorted(llama.iterdir()))
    assert local(Path("org/tiny")) == local(Path("org/tiny@main")) == local(Path(f"org/tiny@{COMMIT}")) == snapshot
    rounding = ("--scheme", "int4-g32", "--method", "rtn", "--calib", "none")
    assert run("quantize", "org/tiny", "out", *rounding)[0] == 0
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_symlink()]
    assert "base_model: org/tiny" in (tmp_path / "out/README.md").read_text()
    code, found = run("eval", "out", "--reference", "org/tiny", "--text", text, "--tokens", "128", "--seqlen", "32")
    assert code == 0
    assert found["kl_mean"] > 0
    assert run("inspect", "org/tiny")[0] == run("convert", "org/tiny", "tiny.gguf")[0] == 0
    model = bitwright.load("org/tiny@main")
    assert model.config.vocab_size == 257
    shutil.move(tmp_path / "tiny.gguf", cache.parent / "q.gguf")
    gguf = cached(cache, "org/tiny-gguf", [cache.parent / "q.gguf"], "v2") / "q.gguf"
    assert local(Path("org/tiny-gguf@v2:q.gguf")) == gguf
    assert run("inspect", "org/tiny-gguf@v2:q.gguf")[0] == 0


def test_a_directory_of_that_name_comes_first(cache: Path, llama: Path, tmp_path: Path) -> None:
    cached(cache, "org/tiny", sorted(llama.iterdir()))
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert local(Path("org/tiny")) == Path("org/tiny")


@pytest.mark.parametrize(
    "command", ["quantize", "eval", "generate", "inspect", "convert", "compare", "bench", "imatrix", "plan"]
)
def test_no_network_and_nothing_cached(cache: Path, command: str, tmp_path: Path) -> None:
    alone = {"generate": ["--prompt", "a"], "plan": ["out", "--bits", "4.5"], "eval": [], "inspect": [], "bench": []}
    more = alone.get(command, ["out"])
    code, error = run(command, "org/missing", *more)
    assert code == 2
    assert "no such file or directory here" in error["error"]
    assert "the hub cannot be reached" in error["error"]
    assert "hf download org/missing" in error["remedy"]
    assert not (tmp_path / "out").exists()


def test_offline_is_said_as_such(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, error = run("eval", "org/missing", "--reference", "org/other")
    assert code == 2
    assert "HF_HUB_OFFLINE" in error["error"]


def test_a_reference_and_a_revision_that_are_missing(cache: Path, llama: Path) -> None:
    cached(cache, "org/tiny", sorted(llama.iterdir()))
    code, error = run("eval", str(llama), "--reference", "org/tiny@v9")
    assert (code, error["where"]) == (2, "org/tiny@v9")


def test_what_others_left_incomplete_is_used_only_if_its_weights_are_all_there(cache: Path, llama: Path) -> None:
    """As transformers leaves it if only a model, or only a tokenizer, was loaded by this name."""
    without_tokenizer = [file for file in sorted(llama.iterdir()) if "token" not in file.name]
    snapshot = cached(cache, "org/half", without_tokenizer)
    assert local(Path("org/half")) == snapshot  # the hub is asked for the rest, in vain
    cached(cache, "org/other", [llama / "config.json", llama / "tokenizer.json"])
    with pytest.raises(CheckpointError, match="the hub gave none"):
        local(Path("org/other"))


def test_downloads_ask_for_what_is_needed_alone(cache: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter of huggingface_hub, on the names of files that repositories hold."""
    seen: list[dict[str, Any]] = []

    def download(repo: str, **asked: Any) -> str:
        if asked.get("local_files_only"):
            return real(repo, **asked)
        seen.append(asked)
        return str(cached(cache, repo, sorted(llama.iterdir())))

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local(Path("org/new@v1")).name == COMMIT
    held = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "LICENSE",
    ]  # fmt: skip
    other = [
        "original/config.json", "original/model.safetensors", "onnx/model.onnx", "pytorch_model.bin",
        "consolidated.safetensors", "model.Q4_K_M.gguf", "modeling_custom.py", "onnx/tokenizer.json", "figures/a.png",
    ]  # fmt: skip
    patterns = {name: seen[0][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(held + other, **patterns)) == held
    assert seen[0]["revision"] == "v1"


def test_a_split_gguf_file_is_downloaded_whole() -> None:
    name = HubName.of("org/name:big/q4-00001-of-00003.gguf")
    assert name is not None
    held = [f"big/q4-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found = huggingface_hub.utils.filter_repo_objects(
        [*held, "big/q8-00001-of-00003.gguf"], allow_patterns=name.patterns
    )
    assert list(found) == held


def test_what_the_hub_refuses_has_a_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str, **asked: Any) -> str:
        if asked.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("nothing")
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for error, remedy in (
        (RepositoryNotFoundError, "check the name"),
        (huggingface_hub.errors.GatedRepoError, "accept its terms"),
        (huggingface_hub.errors.RevisionNotFoundError, "branch, tag or commit"),
        (huggingface_hub.errors.HfHubHTTPError, "run it again"),
    ):
        with pytest.raises(CheckpointError) as refused:
            local(Path("org/name@v1"))
        assert remedy in refused.value.remedy, error


@pytest.mark.parametrize("path", ["missing", "a/b/c", "/org/name", "../org/name", "org/na me", "org/name@"])
def test_other_paths_are_no_names(path: str, cache: Path) -> None:
    assert local(Path(path)) == Path(path)
    code, error = run("inspect", path)
    assert code == 2
    assert "org/name" in error["remedy"]


def test_the_name_of_a_snapshot() -> None:
    assert name_of(Path(f"/x/hub/models--org--a-b/snapshots/{COMMIT}")) == "org/a-b"
    assert name_of(Path("/x/models/org/a-b")) is None
