"""compare: one pass for many, each candidate what `quantize` would have made, resumable, with a table and a page."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.cli.app import app
from bitwright.errors import InputError, OutputError, RecipeError, SchemeError
from bitwright.evaluation import compare as compare_module
from bitwright.evaluation.compare import compare
from bitwright.evaluation.contests import Settings
from bitwright.pipeline.ledger import from_jsonl
from conftest import make_checkpoint


def settings(text: str, **more: Any) -> Settings:
    return Settings(
        **{"calib": text, "samples": 8, "seqlen": 32, "text": text, "tokens": 512, "eval_seqlen": 32, **more}
    )


def test_candidates_are_what_quantize_and_eval_give(llama: Path, text: str, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    done = compare(
        llama,
        tmp_path / "out",
        schemes=["int4-g32", "q8_0"],
        methods=["rtn", "awq+gptq", "gptaq"],
        settings=settings(text),
        progress=lambda *step: steps.append(step),
    )
    assert [(c.scheme, c.method) for c in done.candidates] == [
        (scheme, method) for scheme in ("int4-g32", "q8_0") for method in ("rtn", "awq+gptq", "gptaq")
    ]
    labels = {c.method: c.statistics for c in done.candidates}
    assert labels == {"rtn": "none", "awq+gptq": "one-shot", "gptaq": "sequential"}
    assert not done.refused and not (tmp_path / "out.partial").exists()
    for c in done.candidates:
        folder = tmp_path / "out" / f"{c.scheme}-{c.method}"
        alone = evaluate(folder, reference=llama, text=text, seqlen=32, tokens=512)
        assert alone.kl_mean == pytest.approx(c.kl_mean, rel=1e-3, abs=1e-9) and alone.perplexity == c.perplexity
        assert c.bits_per_weight == alone.bits_per_weight
        assert {f"{n}.weight": loss for n, loss in c.losses.items()} == {
            e.name: e.loss for e in from_jsonl(folder / "ledger.jsonl") if e.loss is not None
        }
    quantize(llama, tmp_path / "alone", scheme="int4-g32", method="gptaq", calib=text, samples=8, seqlen=32)
    assert weights(tmp_path / "alone") == weights(tmp_path / "out/int4-g32-gptaq")
    assert [step[1] for step in steps] == sorted(step[1] for step in steps) and steps[-1][1] <= steps[-1][2]
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["candidates"][1]["method"] == "awq+gptq" and len(content["candidates"]) == 6
    page = (tmp_path / "out/compare.html").read_text()
    assert page.startswith("<!doctype html>") and "awq+gptq" in page
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {"compare.json", "compare.html"}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_mixes_and_recipes_compete_as_gguf_files(llama: Path, text: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    rules = [("*", "q5_1"), ("*.down_proj", "q8_0"), ("*.q_proj", "keep")]
    entries = [f'[[rule]]\nmatch = "{match}"\nscheme = "{scheme}"\nmethod = "rtn"' for match, scheme in rules]
    plan.write_text("pure = true\n" + "\n".join(entries))
    lists: dict[str, Any] = {"schemes": ["int4-g32"], "methods": ["gptq"], "mixes": ["q4_k_m"], "recipes": [plan]}
    done = compare(llama, tmp_path / "out", **lists, settings=settings(text, keep=False), store=tmp_path / "kept")
    assert not done.notes and {c.statistics for c in done.candidates[:2]} == {"one-shot"}
    assert (tmp_path / "kept/block-00000.json").is_file() and (tmp_path / "kept/gguf/block-00000.json").is_file()
    assert [(c.kind, c.scheme, c.method) for c in done.candidates] == [
        ("scheme", "int4-g32", "gptq"), ("mix", "q4_k_m", "gptq"), ("recipe", "plan", "rtn"),
    ]  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"compare.json", "compare.html"}
    made = quantize(llama, tmp_path / "plan.gguf", recipe=plan, calib=text, samples=8, seqlen=32)
    alone = evaluate(tmp_path / "plan.gguf", reference=llama, text=text, seqlen=32, tokens=512)
    _, mix, recipe = done.candidates
    assert (recipe.bytes, recipe.kl_mean) == (made.bytes, pytest.approx(alone.kl_mean, rel=1e-3))
    assert recipe.given["model.layers.0.mlp.down_proj"] == ("int8-g32", 8.5)
    assert (
        recipe.given["model.layers.1.mlp.up_proj"] == ("q5_1", 6.0)
        and "model.layers.0.self_attn.q_proj" not in recipe.given
    )
    assert len({scheme for scheme, _ in mix.given.values()}) > 1
    assert "What each matrix got" in (tmp_path / "out/compare.html").read_text()


def test_sequential_candidates_are_those_of_quantize(llama: Path, text: str, tmp_path: Path) -> None:
    done = compare(
        llama, tmp_path / "out", schemes=["int4-g32"], methods=["gptq"], settings=settings(text, sequential=True)
    )
    assert done.candidates[0].statistics == "sequential"
    quantize(llama, tmp_path / "alone", scheme="int4-g32", method="gptq", calib=text, samples=8, seqlen=32)
    assert weights(tmp_path / "alone") == weights(tmp_path / "out/int4-g32-gptq")


def test_a_rotated_model_has_statistics_of_its_own(llama: Path, text: str, tmp_path: Path) -> None:
    """Neither pass throws the other's statistics away."""
    kept = tmp_path / "kept"
    done = compare(
        llama,
        tmp_path / "out",
        schemes=["int4-g32"],
        methods=["gptq", "rotate+gptq", "awq"],
        settings=settings(text),
        store=kept,
    )
    assert not done.notes and {c.statistics for c in done.candidates} == {"one-shot"}
    assert (kept / "block-00000.json").is_file() and (kept / "rotated-0/block-00000.json").is_file()


def test_what_was_judged_may_go_and_statistics_may_stay(llama: Path, text: str, tmp_path: Path) -> None:
    done = compare(
        llama,
        tmp_path / "out",
        schemes=["int4-g32"],
        methods=["rtn", "gptq"],
        settings=settings(text, keep=False),
        store=tmp_path / "kept",
    )
    assert len(done.candidates) == 2 and not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert (tmp_path / "kept/block-00002.json").is_file()
    taken = (tmp_path / "kept/block-00002.safetensors").stat().st_mtime_ns
    compare(
        llama,
        tmp_path / "more",
        schemes=["int3-g32"],
        methods=["gptq"],
        settings=settings(text),
        store=tmp_path / "kept",
    )
    assert (tmp_path / "kept/block-00002.safetensors").stat().st_mtime_ns == taken


def test_a_finished_candidate_is_never_done_again(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "schemes": ["int4-g32"],
        "methods": ["rtn", "gptq", "search"],
        "settings": settings(text),
    }
    honest, judged = compare_module.evaluate, list[str]()

    def dies(folder: Path, **more: Any) -> Any:
        judged.append(folder.name)
        if folder.name.endswith("search"):
            raise KeyboardInterrupt
        return honest(folder, **more)

    monkeypatch.setattr(compare_module, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        compare(llama, tmp_path / "out", **arguments)
    assert judged[1:] == ["int4-g32-rtn", "int4-g32-gptq", "int4-g32-search"]
    with pytest.raises(OutputError, match="another kind"):
        compare(llama, tmp_path / "out", **{**arguments, "settings": settings(text, seed=1)})
    judged.clear()
    monkeypatch.setattr(
        compare_module, "evaluate", lambda folder, **more: (judged.append(folder.name), honest(folder, **more))[1]
    )
    monkeypatch.setattr(compare_module, "run", None)  # all three were written: nothing is quantized again
    done = compare(llama, tmp_path / "out", **arguments)
    assert judged[1:] == ["int4-g32-search"] and len(done.candidates) == 3


def test_kill_9_and_resume(text: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=6)
    command = [
        sys.executable,
        "-m",
        "bitwright",
        "compare",
        str(model),
        str(tmp_path / "out"),
        "--schemes",
        "int4-g32",
        "--methods",
        "rtn,gptq,awq",
        "--calib",
        text,
        "--samples",
        "8",
        "--seqlen",
        "32",
        "--text",
        text,
        "--tokens",
        "256",
        "--eval-seqlen",
        "32",
        "--json",
    ]
    partial = tmp_path / "out.partial"
    for signs in ("statistics/block-00001.json", "int4-g32-rtn.json", "int4-g32-gptq"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (partial / signs).exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [c["method"] for c in done["candidates"]] == ["rtn", "gptq", "awq"] and not partial.exists()


def test_combinations_that_cannot_be_are_named(llama: Path, text: str, tmp_path: Path) -> None:
    arguments = [
        "--calib",
        text,
        "--samples",
        "8",
        "--seqlen",
        "32",
        "--text",
        text,
        "--tokens",
        "256",
        "--eval-seqlen",
        "32",
    ]
    command = [
        "compare",
        str(llama),
        str(tmp_path / "out"),
        "--schemes",
        "int4-g32,nf4-g64",
        "--methods",
        "rtn,hqq,smooth",
    ]
    done = CliRunner().invoke(app, [*command, *arguments, "--json"])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert [(c["scheme"], c["method"]) for c in found["candidates"]] == [("int4-g32", "rtn"), ("nf4-g64", "rtn")]
    assert len(found["refused"]) == 4 and any("float minima" in line for line in found["refused"])
    assert all(line in found["notes"] for line in found["refused"])


@pytest.mark.parametrize(
    ("schemes", "methods", "kind", "message"),
    [
        (["int4-g32"], ["hqq"], RecipeError, "none of these"),
        (["int4-g32"], ["rtn", "rtn"], RecipeError, "named twice"),
        ([], ["rtn"], RecipeError, "none is"),
        (["int4-g33"], ["rtn"], SchemeError, "unknown group"),
        (["int4-g32"], ["rtm"], RecipeError, "unknown method"),
    ],
)
def test_bad_lists(
    schemes: list[str], methods: list[str], kind: type[Exception], message: str, llama: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        compare(llama, tmp_path / "out", schemes=schemes, methods=methods, settings=settings(text))
    assert not list(tmp_path.iterdir())


def test_bad_mixes_and_recipes(llama: Path, text: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ["rtn"], "settings": settings(text)}
    with pytest.raises(RecipeError, match=r"q4_k_l is none of llama.cpp's mixes"):
        compare(llama, tmp_path / "out", schemes=[], mixes=["q4_k_l"], **asked)
    (tmp_path / "int4-g32.toml").write_text('[[rule]]\nmatch = "*"\nscheme = "int8-channel"')
    with pytest.raises(RecipeError, match="a scheme is named twice"):
        compare(llama, tmp_path / "out", schemes=["int4-g32"], recipes=[tmp_path / "int4-g32.toml"], **asked)
    with pytest.raises(RecipeError, match=r"missing.toml"):
        compare(llama, tmp_path / "out", schemes=["int4-g32"], recipes=[tmp_path / "missing.toml"], **asked)


def test_out_that_exists_and_results_that_are_damaged(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="exists"):
        compare(llama, tmp_path, schemes=["int4-g32"], methods=["rtn"], settings=settings(text))
    monkeypatch.setattr(compare_module, "_finish", lambda *_: None)
    compare(llama, tmp_path / "out", schemes=["int4-g32"], methods=["rtn"], settings=settings(text))
    (tmp_path / "out.partial/int4-g32-rtn.json").write_text('{"judged": 1}')
    with pytest.raises(Exception, match="not a result") as caught:
        compare(llama, tmp_path / "out", schemes=["int4-g32"], methods=["rtn"], settings=settings(text))
    assert "remove the file" in str(caught.value)


def test_the_terminal_shows_names_winner_and_page(llama: Path, text: str, tmp_path: Path) -> None:
    command = ["compare", str(llama), str(tmp_path / "out"), "--schemes", "int3-g32", "--methods", "rtn,gptq"]
    more = [
        "--calib",
        text,
        "--samples",
        "8",
        "--seqlen",
        "32",
        "--text",
        text,
        "--tokens",
        "256",
        "--eval-seqlen",
        "32",
    ]
    done = CliRunner().invoke(app, [*command, *more], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith(" int3-g32") or line.startswith("int3-g32")]
    assert len(lines) == 2 and "best" in next(line for line in lines if "gptq" in line)
    assert "compare.html" in done.output.replace("\n", "")  # its path may be longer than a line


def test_the_original_and_each_candidate_tell_of_every_block_that_is_judged(
    llama: Path, text: str, tmp_path: Path
) -> None:
    steps: list[tuple[str, int, int]] = []
    how = {"schemes": ["int8-channel"], "methods": ["rtn"], "settings": settings(text)}
    compare(llama, tmp_path / "out", **how, progress=lambda *step: steps.append(step))  # type: ignore[arg-type]
    blocks = 3
    for whose in ("the original", "int8-channel-rtn"):
        told = [done for what, done, _ in steps if what == f"{whose}: evaluation"]
        assert told == list(range(told[0], told[0] + blocks + 1)), (whose, steps)
    assert steps[-1][1] == steps[-1][2] and [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


@pytest.mark.parametrize(
    ("more", "said"), [({"text": "nothere.txt"}, "cannot read"), ({"eval_seqlen": 4096}, "positions")]
)
def test_a_text_that_cannot_be_judged_on_is_refused_before_work(
    llama: Path, text: str, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        compare(
            llama, tmp_path / "out", schemes=["int8-channel"], methods=["rtn"], settings=replace(settings(text), **more)
        )
    assert not list(tmp_path.iterdir()) and ("text" in more or "--eval-seqlen" in refused.value.remedy)
