"""`bitwright finetune` and `merge`: adapters of peft's that learn, resume to the same bytes, and are kept by the rounding."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitwright import quantize
from bitwright.cli.app import app
from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    FormatError,
    InputError,
    NumericsError,
    OutputError,
    RecipeError,
)
from bitwright.evaluation.merge import BESIDE, MERGED, NEAREST, Settings, merge
from bitwright.models.adapter import Adapter
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import open_weights
from bitwright.pipeline.convert_adapter import adapter_to_gguf
from bitwright.pipeline.options import QuantizeOptions
from bitwright.pipeline.quantize import planned
from bitwright.train import finetune as module
from bitwright.train.data import IGNORED, training_data
from bitwright.train.finetune import finetune
from bitwright.train.lora import Lora
from bitwright.train.settings import Training

peft = pytest.importorskip("peft")
HOW = Training(rank=4, steps=4, batch=2, seqlen=32, lr=5e-3, save_every=2)
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "domain.txt"
    file.write_text("".join(f"{i} apples and {i + 1} pears make {2 * i + 1} fruits.\n" for i in range(300)))
    return file


@pytest.fixture(scope="module")
def adapter(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "fruits"
    report = finetune(llama, out, data=str(text), how=replace(HOW, steps=12, save_every=99))
    assert report.loss_after < report.loss_before - 0.1
    assert json.loads((out / "training.json").read_text())["loss_after"] == report.loss_after
    return out


KILLED = """
import os, signal, sys
from pathlib import Path
from bitwright.train import checkpoints
from bitwright.train.finetune import finetune
from bitwright.train.settings import Training

synced, sync = [], checkpoints.sync_folder

def stop(folder):
    synced.append(folder)
    if len(synced) == 3:  # the second checkpoint is written, and not yet under its name
        os.kill(os.getpid(), signal.SIGKILL)
    sync(folder)

checkpoints.sync_folder = stop
how = Training(rank=4, steps=6, batch=2, seqlen=32, lr=5e-3, save_every=2)
finetune(Path(sys.argv[1]), Path(sys.argv[2]), data=sys.argv[3], how=how)
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    whole, cut, how = tmp_path / "whole", tmp_path / "cut", replace(HOW, steps=6)
    dead = subprocess.run([sys.executable, "-c", KILLED, str(llama), str(cut), str(text)], capture_output=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    assert sorted(p.name for p in (tmp_path / "cut.partial").glob("step-*")) == ["step-000002", "step-000004.tmp"]
    assert not cut.exists()
    with pytest.raises(OutputError, match="of another kind"):
        finetune(llama, cut, data=str(text), how=replace(how, lr=1e-3))
    finetune(llama, whole, data=str(text), how=how)
    steps: list[int] = []
    finetune(llama, cut, data=str(text), how=how, progress=lambda _, done, total: steps.append(done))
    assert steps == [3, 4, 5, 6] and not (tmp_path / "cut.partial").exists()
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in FILES)


def test_a_teacher_s_predictions_are_learned(llama: Path, text: Path, tmp_path: Path) -> None:
    how = replace(HOW, scheme="int2-g32", teacher=llama, save_every=99)
    report = finetune(llama, tmp_path / "out", data=str(text), how=how)
    assert 0 < report.loss_after < report.loss_before


def test_what_an_adapter_adds_is_not_rounded_away(llama: Path) -> None:
    """However little it is beside what the weights give, in 16 bits as in 32."""
    model = Lora(llama, HOW, "nf4-g64-dq", torch.bfloat16, b"").adapted
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(200, A.shape[1])
    with torch.no_grad():
        alone = layer(x)
        B.normal_(std=1e-4)
        added, wanted = layer(x) - alone, x @ A.T @ B.T * layer.scaling["default"]
    assert float((added - wanted).norm() / wanted.norm()) < 0.02


def test_an_adapter_can_begin_as_what_rounding_lost(llama: Path, text: Path, tmp_path: Path) -> None:
    quantized, how = tmp_path / "q", replace(HOW, steps=1, teacher=llama)
    quantize(llama, quantized, scheme="int2-g32", method="rtn", format="bitwright", calib="none")
    begun = Lora(quantized, replace(how, init="residual", rslora=True), None, torch.float32, b"").adapted
    source = open_weights(llama)
    for name, layer in begun.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            lost = source.read(f"{name}.weight").float() - layer.base_layer.weight
            best = torch.linalg.svdvals(lost)[4:].norm()
            assert float((lost - layer.get_delta_weight("default")).norm() / best) < 1.005, name
    zero, residual = (
        finetune(quantized, tmp_path / init, data=str(text), how=replace(how, init=init))
        for init in ("zero", "residual")
    )
    assert residual.loss_before < 0.9 * zero.loss_before
    with pytest.raises(CheckpointError, match="makes up for the rounding"):
        plan(llama, tmp_path / "residual", tmp_path)
    for wrong in ({"teacher": None}, {"dora": True}, {"init": "pissa"}):
        with pytest.raises(RecipeError, match="init"):
            replace(how, **{"init": "residual", **wrong})
    with pytest.raises(RecipeError, match="in float"):
        finetune(llama, tmp_path / "out", data=str(text), how=replace(how, init="residual"))


def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = module._Run._lost
    calls: list[int] = []

    def broken(self: Any, part: Any, over: int) -> torch.Tensor:
        calls.append(1)
        found = lost(self, part, over)
        return found * math.nan if found.requires_grad and sum(calls) > 3 else found

    monkeypatch.setattr(module._Run, "_lost", broken)
    with pytest.raises(NumericsError, match="step 3: the loss is nan") as caught:
        finetune(llama, tmp_path / "out", data=str(text), how=HOW)
    kept = next((tmp_path / "out.partial").glob("step-*"))
    assert str(kept) in caught.value.message and not (tmp_path / "out").exists()
    assert all(bool(t.isfinite().all()) for t in load_file(kept / FILES[0]).values())
    assert "lr" in caught.value.remedy
    assert replace(HOW, lr=1e30).lower_rate == 2e-4 and replace(HOW, lr=1e-4).lower_rate == 2.5e-5


def test_a_run_that_made_it_worse_says_so(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([1.5, 2.5])
    monkeypatch.setattr(module._Run, "judge", lambda self: next(found))
    report = finetune(llama, tmp_path / "out", data=str(text), how=replace(HOW, steps=1))
    assert report.notes[-1] == "the loss rose from 1.5 to 2.5 on what was held out: try --lr 0.0002"


CHAT = [
    [{"role": "user", "content": f"What is {i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
    for i in range(20)
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chats(tmp_path: Path, said: list[list[dict[str, str]]]) -> str:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in said))
    return str(file)


def templated(llama: Path, **more: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


OPTIONS: dict[str, Any] = {"seqlen": 96, "vocabulary": 257, "windows": 8, "seed": 0, "where": "model"}


def test_only_answers_count_and_packed_conversations_do_not_see_one_another(llama: Path, tmp_path: Path) -> None:
    tokenizer = templated(llama)
    data = training_data(tokenizer, chats(tmp_path, CHAT), **OPTIONS)
    first = data.seen.take(torch.arange(1))
    assert first.positions is not None and int((first.positions[0] == 0).sum()) > 2
    counted = tokenizer.decode(first.labels[0][first.labels[0] != IGNORED])
    assert counted.startswith("It is 0.\nIt is 2.\n") and "What" not in counted
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    start = int((first.positions[0] == 0).nonzero()[1])
    end = int((first.positions[0] == 0).nonzero()[2])
    packed = model(input_ids=first.ids, position_ids=first.positions, use_cache=False).logits[0, start:end]
    alone = model(input_ids=first.ids[:, start:end]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_conversations_that_teach_nothing_or_do_not_fit_are_named(llama: Path, tmp_path: Path) -> None:
    tokenizer = templated(llama)
    silent, long = [*CHAT[:2], CHAT[2][:1]], [*CHAT[:1], [CHAT[1][0], {"role": "assistant", "content": "so " * 60}]]
    for said, message in ((silent, "no answer"), (long, "longer than a window"), (CHAT[:1], "leave none")):
        with pytest.raises(CalibrationError, match=message) as caught:
            training_data(tokenizer, chats(tmp_path, said), **OPTIONS)
        assert "chat.jsonl" in caught.value.where
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        training_data(tokenizer, chats(tmp_path, CHAT), **OPTIONS)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"rank": 0}, RecipeError, "rank 0"),
        ({"rank": 100_000}, RecipeError, "smaller side"),
        ({"lr": -1.0}, RecipeError, "learning rate"),
        ({"alpha": math.nan}, RecipeError, "alpha nan"),
        ({"seqlen": 4096}, InputError, "positions"),
        ({"targets": ("nothing",)}, RecipeError, "nothing"),
        ({"targets": ("",)}, RecipeError, "not found"),
        ({"targets": ("lm_head",)}, RecipeError, "shares its weight"),
        ({"scheme": "int8-token"}, RecipeError, "for activations"),
        ({"scheme": "int99-g64"}, BitwrightError, "int99"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    change: dict[str, Any], kind: type[Exception], said: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        finetune(llama, tmp_path / "out", data=str(text), how=replace(HOW, **change))
    assert not list(tmp_path.iterdir())


def test_without_peft_the_remedy_installs_it(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="peft") as caught:
        finetune(llama, tmp_path / "out", data=str(text), how=HOW)
    assert caught.value.remedy == "pip install 'bitwright[train]'"


# ------------------------------------------------------------------------------------------------------ adapters, merge


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}, {"use_dora": True}])
def test_the_adapted_weights_are_those_that_peft_merges(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain = {name: p.clone() for name, p in base.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    adapter, skeleton = Adapter(tmp_path / "adapter"), Skeleton(read_config(llama), torch.float32)
    adapter.check(skeleton)
    assert len(adapter.deltas) == 21
    for name, weight in plain.items():
        torch.testing.assert_close(adapter.applied(skeleton, name, weight), merged[name], rtol=1e-5, atol=1e-6)


def test_what_an_adapter_has_whole_and_adds_to_embeddings_is_what_peft_merges(tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    base.save_pretrained(tmp_path / "base")
    plain = {name: p.clone() for name, p in base.state_dict().items()}
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"], bias="all", init_lora_weights=False
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    adapter, skeleton = Adapter(tmp_path / "adapter"), Skeleton(read_config(tmp_path / "base"), torch.float32)
    adapter.check(skeleton)
    changed = {name for name in plain if adapter.changes(name)}
    assert changed == {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < changed
    for name, weight in plain.items():
        torch.testing.assert_close(adapter.applied(skeleton, name, weight), merged[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(FormatError, match="trained whole"):
        adapter_to_gguf(tmp_path / "adapter", tmp_path / "out.gguf", tmp_path / "base")


def test_a_merge_keeps_what_the_adapter_learned(adapter: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    how = Settings(scheme="int4-g32", calib=str(text), samples=8, seqlen=32, tokens=256, eval_seqlen=32)
    told: list[str] = []
    done = merge(
        llama, adapter, tmp_path / "out", settings=how, resume=True, progress=lambda what, *_: told.append(what)
    )
    kinds = dict.fromkeys(what.rpartition("block")[0] for what in told)
    judged = ("judging the base: ", f"judging {MERGED}: ", f"judging {NEAREST}: ", f"judging {BESIDE}: ")
    assert kinds.keys() >= {"", f"{NEAREST}: ", "the base: ", *judged}, kinds
    ways = {way.name: way for way in done.ways}
    assert ways.keys() == {MERGED, NEAREST, BESIDE} and not done.worse
    assert ways[MERGED].kl_mean < ways[NEAREST].kl_mean
    assert max(done.adapted_perplexity, ways[MERGED].perplexity) < done.base_perplexity
    assert 0.5 < ways[MERGED].gain_kept < 1.5
    assert {e.reason for e in done.result.ledger if e.scheme} == {"adapted by fruits"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def broken(adapter: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the adapter after `change(config, tensors)`."""
    out = tmp_path / "broken"
    out.mkdir()
    config, tensors = json.loads((adapter / FILES[1]).read_text()), load_file(adapter / FILES[0])
    change(config, tensors)
    (out / FILES[1]).write_text(json.dumps(config))
    save_file(tensors, out / FILES[0])
    return out


STEM = "base_model.model."
Q = f"{STEM}model.layers.1.self_attn.q_proj.lora_"
WRONG: dict[str, tuple[Any, str]] = {
    "rank": (lambda c, t: c.update(r=8), "not of rank 8"),
    "half": (lambda c, t: t.pop(f"{Q}B.weight"), "no lora_B"),
    "module": (lambda c, t: [t.pop(f"{Q}{x}.weight") for x in "AB"], "nothing for 1 modules"),
    "shape": (lambda c, t: t.update({f"{Q}A.weight": torch.zeros(4, 32)}), "matrix .64, 32., the model's is .64, 64."),
    "other": (
        lambda c, t: t.update({f"{Q[:-5]}x.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}),
        "no linear module",
    ),
    "kind": (lambda c, t: c.update(peft_type="LOHA"), "LOHA"),
    "whole": (lambda c, t: t.update({f"{STEM}model.embed_tokens.weight": torch.zeros(257, 64)}), "shares its weight"),
    "unknown": (lambda c, t: t.update({f"{STEM}score.weight": torch.zeros(2, 64)}), "the model has no 'score.weight'"),
    "rows": (lambda c, t: t.update({f"{STEM}model.norm.weight": torch.zeros(65)}), "matrix .65., the model's is .64."),
    "columns": (
        lambda c, t: (c.update(use_dora=True), t.update({f"{n[:-8]}magnitude_vector": torch.ones(9) for n in list(t)})),
        "not one for each of",
    ),
    "other kind": (lambda c, t: c.update(trainable_token_indices=[1]), "trainable_token_indices"),
    "taken off": (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
    "nan": (lambda c, t: t[f"{Q}B.weight"].fill_(math.nan), "NaN"),
    "config": (lambda c, t: c.pop("r"), "unusable"),
    "no rank": (
        lambda c, t: (c.update(r=0), [t.update({n: t[n][:0] if "A" in n[-8:] else t[n][:, :0]}) for n in t]),
        "rank 0",
    ),
    "no alpha": (lambda c, t: c.update(lora_alpha=math.nan), "alpha nan"),
    "no rank for one": (lambda c, t: c.update(rank_pattern={"q_proj": "four"}), "unusable .*'four'"),
    "no pattern": (lambda c, t: c.update(alpha_pattern={"(q_proj": 4}), "unusable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_does_not_fit_is_refused(name: str, adapter: Path, llama: Path, tmp_path: Path) -> None:
    change, said = WRONG[name]
    with pytest.raises(CheckpointError, match=said) as caught:
        plan(llama, broken(adapter, tmp_path, change), tmp_path)
    assert caught.value.remedy


def test_an_adapter_of_a_matrix_that_the_files_have_in_parts_is_refused(adapter: Path, llama: Path) -> None:
    skeleton = Skeleton(read_config(llama), torch.float32)
    skeleton.conversions = (SimpleNamespace(makes=("model.layers.1.self_attn.q_proj.weight",)),)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="made of several tensors"):
        Adapter(adapter).check(skeleton)


def plan(model: Path, adapter: Path, tmp_path: Path) -> Any:
    options = QuantizeOptions(scheme="int4-g32", method="rtn", calib="none", samples=4, seqlen=32, adapter=adapter)
    return planned(model, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("more", "said"), [({"text": "nothere.txt"}, "cannot read"), ({"eval_seqlen": 4096}, "positions")]
)
def test_a_merge_that_could_not_be_judged_is_refused_before_work(
    adapter: Path, llama: Path, text: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    how = replace(Settings(scheme="int4-g32", calib=str(text), samples=8, seqlen=32, eval_seqlen=32), **more)
    told: list[str] = []
    with pytest.raises(InputError, match=said) as caught:
        merge(llama, adapter, tmp_path / "out", settings=how, resume=True, progress=lambda what, *_: told.append(what))
    assert not told and not list(tmp_path.iterdir())
    assert "text" in more or "--eval-seqlen" in caught.value.remedy


@pytest.mark.parametrize("calib", [None, "general", "none", "general:0.5,fruits.txt:0.5"])
def test_a_merge_without_a_text_to_judge_on_is_refused_before_anything(
    calib: str | None, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "out", [] if calib is None else ["--calib", calib]
    arguments = ["merge", str(llama), str(adapter), str(out), "--scheme", "int4-g32", "--json", *more]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and not list(tmp_path.iterdir()), done.output
    error = json.loads(done.stdout)
    assert "held out" in error["error"] and "--calib FILE" in error["remedy"] and "--text FILE" in error["remedy"]


def test_a_merge_judged_on_a_text_of_its_own_needs_no_other(
    adapter: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    small = ("--samples", "4", "--seqlen", "32", "--tokens", "64", "--eval-seqlen", "32", "--no-compare", "--json")
    arguments = ["merge", str(llama), str(adapter), str(tmp_path / "out"), "--scheme", "int4-g32", "--text", str(text)]
    done = CliRunner().invoke(app, [*arguments, *small])
    assert done.exit_code in (0, 1) and json.loads(done.stdout)["text"] == str(text), done.output


def test_a_base_that_is_quantized_is_refused_with_a_remedy_that_merge_has(
    adapter: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "eight", scheme="int8-channel", method="rtn", calib="none")
    settings = Settings(scheme="int4-g32", calib=str(text), samples=4, seqlen=32, eval_seqlen=32)
    with pytest.raises(CheckpointError, match="already quantized") as caught:
        merge(tmp_path / "eight", adapter, tmp_path / "out", settings=settings, resume=False, progress=lambda *_: None)
    assert "float original" in caught.value.remedy and "--requantize" not in caught.value.remedy


def test_an_adapter_of_other_weights_is_refused(adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert not any("adapter" in note for note in plan(other, adapter, tmp_path).notes)  # a copy has the same weights
    tensors = load_file(other / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained beside other weights"):
        plan(other, adapter, tmp_path)
    named = broken(adapter, tmp_path, lambda c, t: c.update(base_model_name_or_path="someone/else"))
    assert any("someone/else" in note for note in plan(other, named, tmp_path).notes)
