"""Planned recipes: predicted KL against measured, exact bytes, groups that engines fuse, scores kept, and bad input."""

import json
import tomllib
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.families import save_tokenizer
from bench.tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitwright.api import quantize, quantize_tensor
from bitwright.calibration.input_statistics import Inputs
from bitwright.cli.app import app
from bitwright.errors import CheckpointError
from bitwright.formats.ggml import TYPES
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline import scores as scoring
from bitwright.pipeline.calibration_pass import calibration_tokens
from bitwright.pipeline.curvature import curvature
from bitwright.pipeline.planned_recipe import Settings, plan_recipe, prepared
from bitwright.pipeline.scores import scored
from bitwright.plan.target import Target
from conftest import make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}
FEW = ("--samples", "8", "--seqlen", "32")  # the same, as options


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that GGUF's large blocks fit."""
    return make_checkpoint(
        tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=2
    )


def test_the_curvature_predicts_the_kl_of_noise(llama: Path, text: str) -> None:
    """Against the model run by transformers: noise of known size in one matrix, KL over all tokens."""
    plan, _ = prepared(llama, Settings(calib=text, **SMALL))
    ids = calibration_tokens(plan, text, 0).seen
    found = curvature(plan, ids, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        for name in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
            module, seen = model.get_submodule(name), []
            hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
            model(ids)
            hook.remove()
            predicted, measured, weight = 0.0, 0.0, module.weight.data
            for _ in range(4):
                noise = 0.05 * weight.std() * torch.randn_like(weight)
                lost = (found.tokens[name][:, None] * (seen[0] @ noise.T).square()).mean(0)
                predicted += float((lost * found.modules[name]).sum())
                module.weight.data = weight + noise
                after = model(ids).logits.log_softmax(-1)
                measured += float((before.exp() * (before - after)).sum(-1).mean())
            module.weight.data = weight
            assert 0.7 < measured / predicted < 1.4, (name, measured, predicted)


def test_a_token_of_massive_activations_counts_by_its_gradient(text: str, tmp_path: Path) -> None:
    """Its errors are the largest, and hardly reach the prediction: the scores of down_proj against KL of the rounded model."""
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = Settings("bitwright", ("int3-g32",), "rtn", calib=text, **SMALL)
    plan, units = prepared(folder, settings)
    tokens = calibration_tokens(plan, text, 0)
    tokens.seen[:, 0] = 7
    tokens = replace(tokens, held_out=tokens.seen)
    down = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        row = 1000 * model.model.embed_tokens.weight[7]
        model.model.embed_tokens.weight[7] = row
        for part in ("gate_proj", "up_proj"):
            model.get_submodule(f"model.layers.1.mlp.{part}").weight[0] = 30 * row / row.norm()
    model.save_pretrained(folder)
    plan, units = prepared(folder, settings)
    predicted = scored(plan, units, tokens, tmp_path / "scores", lambda *_: None).scores[down]["int3-g32"]
    with torch.no_grad():
        before = model(tokens.seen).logits.log_softmax(-1)
        module = model.get_submodule(down)
        module.weight.data = decode(quantize_tensor(module.weight.data, "int3-g32", method="rtn"))
        after = model(tokens.seen).logits.log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 < measured / predicted < 2, (measured, predicted)


def test_rows_of_the_embedding_count_as_often_as_they_are_read(text: str, tmp_path: Path) -> None:
    """Where all rows that the text reads lie on the grid, rounding the others costs nothing."""
    folder = make_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    settings = Settings("gguf", ("q8_0", "q5_1"), "rtn", calib=text, **SMALL)
    plan, units = prepared(folder, settings)
    tokens, name = calibration_tokens(plan, text, 0), plan.skeleton.embedding_name
    assert plan.skeleton.head_name != name
    before = scored(plan, units, tokens, tmp_path / "before", lambda *_: None).scores[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows, read = model.get_input_embeddings().weight.data, tokens.seen.unique()
    assert 20 < len(read) < len(rows)
    rows[read] = decode(quantize_tensor(rows[read], "q8_0", method="rtn"))
    model.save_pretrained(folder)
    plan, units = prepared(folder, settings)
    after = scored(plan, units, tokens, tmp_path / "after", lambda *_: None).scores[name]
    assert after["q8_0"] < 1e-6 * before["q8_0"] and after["q5_1"] == pytest.approx(before["q5_1"], rel=0.1)


def test_a_plan_takes_at_most_its_bytes_and_quantize_carries_it_out(wide: Path, text: str, tmp_path: Path) -> None:
    recipe, scores = tmp_path / "recipe.toml", tmp_path / "scores"
    arguments = ["--format", "gguf", "--calib", text, *FEW, "--method", "rtn", "--json"]
    arguments += ["--schemes", "q3_k,q4_k,q8_0"]
    given = ["plan", str(wide), str(recipe), "--bits", "4.4", "--scores", str(scores), *arguments]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 4.4 * 0.97 < found["bits_per_weight"] <= 4.4
    assert len(found["schemes"]) > 1
    made = quantize(wide, tmp_path / "out.gguf", recipe=recipe, calib=text, **SMALL)
    assert made.bytes == found["bytes"] == (tmp_path / "out.gguf").stat().st_size
    stored = {entry.name.removesuffix(".weight"): entry.scheme for entry in made.ledger if entry.action == "quantized"}
    assert stored == {unit["match"][0]: str(TYPES[unit["scheme"].upper()].scheme) for unit in found["units"]}
    # another target: the scores are not computed again
    kept = {file.name: file.stat().st_mtime_ns for file in scores.glob("block-*")}
    settings = Settings("gguf", ("q3_k", "q4_k", "q8_0"), "rtn", calib=text, **SMALL)
    size = plan_recipe(wide, Target(size=made.bytes), settings, scores=scores)
    assert size.plan.bytes <= made.bytes
    assert size.kl == pytest.approx(found["predicted_kl"], rel=0.02)
    kl = plan_recipe(wide, Target(kl=1.2 * size.kl), settings, scores=scores)
    assert size.kl < kl.kl <= 1.2 * size.kl
    assert kl.plan.bytes < size.plan.bytes
    assert {file.name: file.stat().st_mtime_ns for file in scores.glob("block-*")} == kept
    # another calibration: they are, and that is said
    other = plan_recipe(wide, Target(kl=1.2 * size.kl), replace(settings, samples=6), scores=scores)
    assert any("of another calibration" in note for note in other.notes)


def test_another_method_is_not_called_another_model(llama: Path, text: str) -> None:
    """Though it computes in another type."""
    ids = torch.arange(64)[None]
    keys = []
    for method in ("rtn", "gptq"):
        plan, units = prepared(llama, Settings(calib=text, method=method, **SMALL))
        plan.skeleton.config.dtype = {"rtn": torch.float32, "gptq": torch.bfloat16}[method]
        keys.append(scoring._key(plan, units, ids, None))
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} <= {"method", "code or precision"}


def test_a_killed_run_is_resumed_block_by_block(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(calib=text, **SMALL, schemes=("int4-g32", "int8-channel"))
    target = Target(size=125_000)
    whole = plan_recipe(llama, target, settings, scores=tmp_path / "whole")

    def stop(what: str, done: int, _: int) -> None:
        if (what, done) == ("scores", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_recipe(llama, target, settings, scores=tmp_path / "cut", progress=stop)
    kept = {file.name for file in (tmp_path / "cut").glob("block-*")}
    assert kept == {"block-00000.json", "block-00001.json"}
    steps: list[tuple[str, int]] = []
    again = plan_recipe(llama, target, settings, scores=tmp_path / "cut", progress=lambda w, d, _: steps.append((w, d)))
    assert steps[0] == ("scores", 2)
    assert again.text == whole.text
    assert again.kl == pytest.approx(whole.kl, rel=1e-6)


def test_what_vllm_fuses_gets_one_scheme(llama: Path, text: str) -> None:
    settings = Settings(calib=text, **SMALL, method="search", schemes=("int3-g64", "int4-g64", "int8-channel"))
    found = plan_recipe(llama, Target(size=115_000), settings)
    layers = {t.layer.name: t.layer.scheme for t in found.plan.tensors if t.layer is not None}
    for i in range(3):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        assert len({layers[f"{attention}{part}_proj"] for part in "qkv"}) == 1
        assert len({layers[f"{mlp}{part}_proj"] for part in ("gate", "up")}) == 1
    assert len(set(layers.values())) > 1
    kept = plan_recipe(llama, Target(size=150_000), replace(settings, keep=("*.down_proj",)))
    assert not any(t.layer is not None and "down_proj" in t.source for t in kept.plan.tensors)
    assert tomllib.loads(kept.text)["rule"][-1] == {"match": "*.down_proj", "scheme": "keep"}


def test_a_matrix_that_no_scheme_but_keep_fits_is_kept(text: str, tmp_path: Path) -> None:
    """In a format of one scheme: rows of 96 have no groups of 64."""
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1, intermediate_size=96)
    settings = Settings("gptq", ("int4-g64", "keep"), "rtn", calib=text, **SMALL, measure=1)
    made = plan_recipe(model, Target(bits=12), settings)
    given = {one.patterns[0].rpartition(".")[2]: one.scheme for one in made.given}
    assert given["down_proj"] == "keep" and "int4-g64" in given.values()


def test_statistics_of_experts_are_not_all_in_memory_at_once(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = tmp_path / "model", scoring._score_together
    tiny_model("mixtral").save_pretrained(model)
    save_tokenizer(model)
    grams: list[weakref.ref[torch.Tensor]] = []
    most = []

    def watched(plan: Any, tried: Any, weights: Any, inputs: Inputs, *others: Any) -> Any:
        if ".experts." in inputs.names[0]:
            grams.append(weakref.ref(inputs.gram))
            most.append(sum(gram() is not None for gram in grams))
        return plain(plan, tried, weights, inputs, *others)

    monkeypatch.setattr(scoring, "_score_together", watched)
    settings = Settings(schemes=("int4-g32", "int8-channel"), method="rtn", calib=text, **SMALL)
    plan, units = prepared(model, settings)
    tokens = calibration_tokens(plan, text, 0)
    scored(plan, units, tokens, tmp_path / "scores", lambda *_: None)
    assert len(grams) > 8 and max(most) <= 2


def test_a_model_that_is_quantized_is_planned_anew_if_that_is_asked_for(llama: Path, text: str, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "eight", scheme="int8-channel", method="rtn", calib="none")
    settings = Settings("bitwright", ("int4-g32", "int8-channel"), "rtn", calib=text, **SMALL)
    with pytest.raises(CheckpointError, match="already quantized") as caught:
        plan_recipe(tmp_path / "eight", Target(bits=7), settings)
    assert "--requantize" in caught.value.remedy
    made = plan_recipe(tmp_path / "eight", Target(bits=7), replace(settings, requantize=True))
    assert 6.6 < made.plan.bits_per_weight <= 7


def test_quantize_to_a_size_does_both(llama: Path, text: str, tmp_path: Path) -> None:
    smallest = quantize(llama, tmp_path / "all4", scheme="int4-g64", method="rtn", calib=text, **SMALL).bytes
    limit = smallest + 4000
    made = quantize(llama, tmp_path / "out", size=str(limit), calib=text, **SMALL)
    assert 0.98 * limit < made.bytes <= limit
    assert made.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert len({entry.scheme for entry in made.ledger if entry.action == "quantized"}) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all4", "out"]


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 2, (done.output, done.exception)
    error = json.loads(done.stdout)
    assert error["remedy"]
    named = error["remedy"].removeprefix("names look like ").split(", ")
    assert len(named) == len(set(named))
    return f"{error['where']}: {error['error']}"


def test_bad_input_is_refused(llama: Path, wide: Path, text: str, tmp_path: Path) -> None:
    out = str(tmp_path / "recipe.toml")
    start = ("plan", str(llama), out, "--calib", text, *FEW, "--method", "rtn")
    reach = refused(*start, "--size", "10KB")
    assert "reach from" in reach and " to " in reach and "10,000 bytes" in reach
    assert "reach from" in refused(*start, "--size", "10MB")
    assert "predicted KL" in refused(*start, "--kl", "1e-12")
    assert "--size and --bits" in refused(*start, "--bits", "4", "--size", "1MB")
    assert "one target" in refused(*start)
    assert "above 0" in refused(*start, "--bits", "0")
    assert "finite" in refused(*start, "--bits", "inf")
    assert "not a size" in refused(*start, "--size", "many")
    assert "reach from" in refused(*start, "--size", "9" * 400 + "GB")
    assert "not a multiple" in refused(*start, "--bits", "4", "--schemes", "int8-channel,int4-g256")
    assert "no container for q4_k" in refused(*start, "--bits", "4", "--schemes", "int8-channel,q4_k")
    assert "for activations" in refused(*start, "--bits", "4", "--schemes", "int8-token,int4-g64")
    assert "without a name" in refused(*start, "--bits", "4", "--schemes", "int4-g64,")
    assert "keep alone" in refused(*start, "--bits", "16", "--schemes", "keep")
    assert "keeps every matrix" in refused(*start, "--bits", "16", "--schemes", "int4-g64,keep")
    assert " take " in refused(*start, "--bits", "4", "--schemes", "int4-g64")
    assert "none of GGUF's block types" in refused(*start, "--bits", "4", "--format", "gguf", "--schemes", "int4-g64")
    assert "one scheme" in refused(*start, "--bits", "4", "--format", "gptq", "--schemes", "int4-g64,int8-channel")
    assert "nothing to plan" in refused(*start, "--bits", "4", "--format", "bitsandbytes")
    assert "matches nothing" in refused(*start, "--bits", "4", "--keep", "*.nowhere")
    assert "by itself" in refused(*start[:-1], "awq+gptq", "--bits", "4")
    quantizing = ("quantize", str(llama), str(tmp_path / "out"), "--calib", text, "--size", "1MB")
    assert "--scheme" in refused(*quantizing, "--scheme", "int4-g64")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("")
    assert "not a directory of scores" in refused(*start, "--kl", "0.1", "--scores", str(foreign))
    assert not Path(out).exists()
    Path(out).write_text(plan_recipe(llama, Target(size=125_000), Settings(calib=text, method="rtn", **SMALL)).text)
    other = refused("quantize", str(wide), str(tmp_path / "out"), "--recipe", out, "--calib", text)
    assert "planned for a model of other matrices" in other


@pytest.mark.parametrize(
    ("target", "remedy"),
    [
        (["--size", "1MB", "--bits", "4"], "give one of --bits 4.25 and --size 100MB"),
        (["--bits", "0"], "--bits 4.25 or --size 100MB"),
        (["--size", "10KB"], "a --size or --bits between them"),
        (["--size", "10MB"], "a --size or --bits between them"),
    ],
)
def test_quantize_names_only_options_of_its_own(
    target: list[str], remedy: str, llama: Path, text: str, tmp_path: Path
) -> None:
    start = ("quantize", str(llama), str(tmp_path / "out"), "--calib", text, *FEW, "--json")
    done = CliRunner().invoke(app, [*start, *target])
    assert done.exit_code == 2 and json.loads(done.stdout)["remedy"] == remedy


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_dry_run_says_what_can_be_reached_and_scores_nothing(
    command: str, llama: Path, text: str, tmp_path: Path
) -> None:
    more = ["--scores", str(tmp_path / "scores")] if command == "plan" else []
    start = [command, str(llama), str(tmp_path / "out"), "--calib", text, *FEW, *more]
    dry = CliRunner().invoke(app, [*start, "--size", "125KB", "--dry-run", "--json"])
    assert dry.exit_code == 0 and not list(tmp_path.iterdir()), dry.output
    found = json.loads(dry.stdout)
    made = plan_recipe(llama, Target(size=125_000), Settings(calib=text, method="rtn", **SMALL))
    assert (found["smallest_bytes"], found["largest_bytes"]) == tuple(end[0] for end in made.bounds)
    assert found["smallest_bytes"] < 125_000 < found["largest_bytes"]
    assert (
        found["target"] == "125,000 bytes" and found["peak_memory_bytes"] and found["format"] == made.plan.format.name
    )
    shown = CliRunner().invoke(app, [*start, "--bits", "9", "--dry-run"])
    assert shown.exit_code == 0 and "smallest_bits_per_weight" in shown.stdout, shown.output
    refusals = (["--size", "10KB"], ["--size", "1MB", "--bits", "4"], ["--bits", "5", "--calib", "/no/such.txt"])
    for wrong in refusals:
        ended = [CliRunner().invoke(app, [*start, *wrong, "--json", *end]) for end in (["--dry-run"], [])]
        assert [one.exit_code for one in ended] == [2, 2] and ended[0].stdout == ended[1].stdout
    assert not list(tmp_path.iterdir())


def test_an_encoder_has_nothing_to_plan_by(text: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "bert", "bert")
    with pytest.raises(CheckpointError, match="predict no next token"):
        plan_recipe(model, Target(bits=4.5), Settings("gguf", calib=text, **SMALL))


def loud(folder: Path, by: float) -> Path:
    """A model whose block 1 has a channel of large activations before down_proj, which the next matrix takes back."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[3] *= by
        mlp.down_proj.weight[:, 3] /= by
    model.save_pretrained(folder)
    return folder


def test_what_rounding_inputs_costs_is_predicted(text: str, tmp_path: Path) -> None:
    """Against the model run by transformers, with the inputs of one layer rounded."""
    folder = loud(make_checkpoint(tmp_path / "model", num_hidden_layers=2), 30)
    plan, units = prepared(folder, Settings("bitwright", ("int8-channel",), "rtn", calib=text, **SMALL))
    tokens, scheme = calibration_tokens(plan, text, 0), Scheme.parse("int4-token")
    scores = scored(plan, units, tokens, tmp_path / "scores", lambda *_: None, scheme).scores
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)  # KLs of 1e-8 are noise in float32
    rounding, found = InputQuantization(scheme), {}
    with torch.no_grad():
        before = model(tokens.seen).logits.log_softmax(-1)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"):
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounding(args[0]),))
            after = model(tokens.seen).logits.log_softmax(-1)
            hook.remove()
            found[name] = float((before.exp() * (before - after)).sum(-1).mean())
            assert 0.5 < scores[name]["inputs"] / found[name] < 2, (name, scores[name]["inputs"], found[name])
    assert max(found, key=lambda name: found[name]) == "model.layers.1.mlp.down_proj"


def test_inputs_are_rounded_where_it_costs_least(text: str, tmp_path: Path) -> None:
    model = loud(make_checkpoint(tmp_path / "model", num_hidden_layers=2), 1000)
    settings = Settings(
        schemes=("int8-channel", "int4-g32"), method="rtn", calib=text, **SMALL, activations="int8-token",
        activations_kl=1e-5,
    )  # fmt: skip
    made = plan_recipe(model, Target(bits=12.83), settings, scores=tmp_path / "scores")
    left = [one.patterns for one in made.given if not one.activations]
    assert left == [("model.layers.1.mlp.down_proj",)]
    with_inputs = {rule["match"]: rule.get("activations") for rule in tomllib.loads(made.text)["rule"]}
    assert with_inputs == {"*": "int8-token", "model.layers.1.mlp.down_proj": None}
    (tmp_path / "recipe.toml").write_text(made.text)
    done = quantize(model, tmp_path / "out", recipe=tmp_path / "recipe.toml", calib=text, **SMALL)
    assert done.bytes == made.plan.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert [entry.name for entry in done.ledger if entry.action == "quantized" and not entry.activations] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    without = plan_recipe(
        model, Target(bits=12.83), replace(settings, activations_kl=1e-12), scores=tmp_path / "scores"
    )
    assert not any(one.activations for one in without.given)
    assert without.kl < made.kl < without.kl + 1e-5
    whole = plan_recipe(model, Target(kl=2e-5), settings, scores=tmp_path / "scores")
    assert without.kl < whole.kl <= 2e-5


def test_rounded_inputs_that_no_plan_can_have(llama: Path, text: str, tmp_path: Path) -> None:
    start = ("plan", str(llama), str(tmp_path / "recipe.toml"), "--calib", text, *FEW)
    both = ("--activations", "int8-token", "--activations-kl", "0.01")
    assert "by itself says nothing" in refused(*start, "--bits", "8", *both[:2])
    assert "by itself says nothing" in refused(*start, "--bits", "8", *both[2:])
    assert "token by token" in refused(*start, "--bits", "8", "--activations", "int8-tensor", *both[2:])
    assert "buys nothing" in refused(*start, "--bits", "8", *both[:2], "--activations-kl", "0")
    assert "holds no inputs" in refused(*start, "--bits", "8", "--format", "gguf", *both)
    assert "nothing is left" in refused(*start, "--kl", "0.01", *both)
