"""The main job end to end: quantize, reopen with other people's readers, resume, and never silently."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitwright import evaluate, quantize
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource
from bitwright.pipeline.ledger import from_jsonl
from bitwright.pipeline.work_in_progress import ledger_beside
from conftest import FAMILIES, make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every shard, as the safetensors library reads them."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64-asym", "int8-channel", "fp8-channel", "mxfp4", "nvfp4"])
def test_transformers_loads_what_was_written(llama: Path, text: str, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    done = quantize(llama, out, scheme=scheme, method="gptq", calib=text, **SMALL)
    assert not done.fallbacks
    assert done.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    ids = torch.arange(30)[None]
    logits = model(ids).logits.float()
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    weight_source = WeightSource(out)
    dense.load_state_dict(
        {f"{m}.weight": weight_source.read(f"{m}.weight") for m in weight_source.modules}, strict=False
    )
    assert len(weight_source.modules) == 3 * 7
    torch.testing.assert_close(logits, dense(ids).logits.float(), rtol=0, atol=0.02)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_quantizes_and_evaluates(family: str, text: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", family)
    out = tmp_path / "out"
    done = quantize(source, out, scheme="int8-g32", method="gptq", format="gptq", calib=text, **SMALL)
    names = {entry.name for entry in done.ledger}
    assert names == set(WeightSource(source).shapes)
    quantized = [entry for entry in done.ledger if entry.action == "quantized"]
    assert len(quantized) == sum(
        len(Skeleton(read_config(source), torch.float32).linears(i)) for i in range(len_of(source))
    )
    assert all(entry.loss is not None and entry.loss < 1e-3 for entry in quantized)
    cost = evaluate(out, reference=source, text=text, seqlen=32, tokens=256)
    assert cost.kl_mean is not None and cost.kl_mean < 1e-3
    assert cost.top1 is not None and cost.top1 > 0.9


def len_of(source: Path) -> int:
    return len(Skeleton(read_config(source), torch.float32))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_walk_gives_the_logits_of_transformers(family: str, text: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", family, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(source)(Path(text).read_text()[:256])["input_ids"]
    windows = torch.tensor(ids).view(-1, 32)
    with torch.no_grad():
        log_p = model(windows).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(-1, windows[:, 1:, None])
    cost = evaluate(source, text=text, seqlen=32, tokens=256)
    assert cost.tokens == nll.numel()
    assert cost.perplexity == pytest.approx(float(nll.double().mean().exp()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
def test_source_types_shards_and_companions(dtype: torch.dtype, method: str, text: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", dtype=dtype, shard="60KB", tie_word_embeddings=False)
    assert len(list(source.glob("*.safetensors"))) > 2
    (source / "generation_config.json").write_text('{"temperature": 0.25}')
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    quantize(source, tmp_path / "out", scheme="int4-g32-asym", method=method, calib=text, **SMALL)
    assert before == {file.name: file.read_bytes() for file in source.iterdir()}, "the source was changed"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    kept = weights(source)
    written = weights(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], kept["lm_head.weight"])
    assert written["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_ledger_beats_rtn_and_says_so(llama: Path, text: str, tmp_path: Path) -> None:
    done = quantize(llama, tmp_path / "out", scheme="int3-g64-asym", method="gptq", calib=text, **SMALL)
    entries = from_jsonl(tmp_path / "out" / "ledger.jsonl")
    assert entries == done.ledger
    for entry in (e for e in entries if e.action == "quantized"):
        assert entry.loss is not None and entry.loss_rtn is not None and entry.loss < entry.loss_rtn
        assert entry.tokens == 8 * 32 and entry.damping >= 0.01 and entry.scheme == "int3-g64-asym-bf16"
    assert sum(e.bytes for e in entries) == sum(t.nbytes for t in weights(tmp_path / "out").values())


def test_quantized_blocks_feed_the_next(llama: Path, text: str, tmp_path: Path) -> None:
    """The second block's Gram is that of the quantized first block: its ledgered loss depends on the first's bits."""
    first = tmp_path / "coarse.toml"
    first.write_text('[[rule]]\nmatch = "model.layers.0.*"\nscheme = "int2-g64-asym"\n')
    a = quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, recipe=first, **SMALL).ledger
    b = quantize(llama, tmp_path / "b", scheme="int4-g32", calib=text, **SMALL).ledger
    name = "model.layers.1.self_attn.q_proj.weight"
    assert next(e.loss for e in a if e.name == name) != next(e.loss for e in b if e.name == name)


def command(model: Path, out: Path, text: str, *more: str) -> list[str]:
    start = [sys.executable, "-m", "bitwright", "quantize", str(model), str(out), "--calib", text, "--json"]
    scheme = "q8_0" if out.suffix == ".gguf" else "int3-g32-asym"
    return [*start, "--scheme", scheme, "--samples", "8", "--seqlen", "32", *more]


def comparable(out: Path) -> dict[str, object]:
    """All files of a result, the ledger's clock readings aside."""
    whole = {"model.gguf": out} if out.is_file() else {file.name: file for file in sorted(out.iterdir())}
    files: dict[str, object] = {name: file.read_bytes() for name, file in whole.items()}
    lines = (ledger_beside(out) if out.is_file() else out / "ledger.jsonl").read_text().splitlines()
    files["ledger.jsonl"] = [{**json.loads(line), "seconds": 0} for line in lines]
    return files


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_kill_and_resume_gives_the_same_bytes(text: str, tmp_path: Path, suffix: str) -> None:
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=8)
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    subprocess.run(command(model, whole, text), check=True, capture_output=True)
    partial = tmp_path / f"killed{suffix}.partial"
    for shards in (1, 4):  # killed as soon as so many blocks are committed
        process = subprocess.Popen(command(model, out, text), stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(partial.glob("ledger-*"))) < shards:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists() and partial.is_dir()
        assert not suffix or [file.name for file in partial.glob("model*")] == ["model.gguf"]
    first = (partial / "ledger-00000.jsonl").read_text()  # with the seconds that the block took
    other = subprocess.run(command(model, out, text, "--seed", "1"), capture_output=True, text=True, check=False)
    assert other.returncode == 2 and "--restart" in json.loads(other.stdout)["remedy"]
    subprocess.run(command(model, out, text), check=True, capture_output=True)
    ledger = ledger_beside(out) if suffix else out / "ledger.jsonl"
    assert ledger.read_text().startswith(first), "the first block was done again"
    assert comparable(out) == comparable(whole)
    assert not partial.exists()
