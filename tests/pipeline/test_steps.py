"""Measured steps: against transformers' model, how ratios are drawn together, and a plan that is put right by them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.families import save_tokenizer
from bench.tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.api import quantize_tensor
from bitwright.calibration.windows import Drawn
from bitwright.errors import RecipeError
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import calibration_tokens
from bitwright.pipeline.planned_recipe import Settings, plan_recipe, prepared
from bitwright.pipeline.scores import scored
from bitwright.pipeline.steps import Step, measured, ratios, steps
from bitwright.plan.allocation import Option
from bitwright.plan.target import Target

SCHEMES = ("int3-g32", "int4-g32", "int8-channel")
RTN = Settings("bitwright", SCHEMES, "rtn", samples=8, seqlen=32)


def silent(*_: object) -> None:
    """No progress."""


@pytest.mark.parametrize("memory", ["enough", "of a part of a window"])
def test_the_kl_of_the_plan_and_of_each_step_is_that_of_the_rounded_model(
    memory: str, llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers, each matrix rounded by itself."""
    plan, units = prepared(llama, replace(RTN, calib=text))
    tokens = calibration_tokens(plan, text, 0)
    judged = tokens.held_out
    if memory != "enough":
        monkeypatch.setattr("bitwright.pipeline.steps.COPIES", 1)
        monkeypatch.setattr("bitwright.pipeline.steps.TOKENS", 12)
        judged = judged[:1, :12]
    names = [unit.members[0].parameter.removesuffix(".weight") for unit in units]
    given = [SCHEMES[i % 2] for i in range(len(units))]
    options = [[Option(scheme, at, -at) for at, scheme in enumerate(SCHEMES)] for _ in units]
    wanted = steps(options, given, range(len(units)))
    assert [step.scheme for step in wanted] == [SCHEMES[1 - i % 2] for i in range(len(units))]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    exact = {name: model.get_submodule(name).weight.data for name in names}

    @torch.no_grad()
    def log_p(schemes: dict[str, str]) -> Tensor:
        for name, weight in exact.items():
            rounded = decode(quantize_tensor(weight, schemes[name], method="rtn")) if schemes else weight
            model.get_submodule(name).weight.data = rounded
        return model(judged).logits[:, :-1].log_softmax(-1)

    before, planned = log_p({}), dict(zip(names, given, strict=True))
    allocations = [planned, *(planned | {names[step.unit]: step.scheme} for step in wanted)]
    expected = [float((before.exp() * (before - log_p(one))).sum(-1).mean()) for one in allocations]
    kl, each = measured(plan, units, given, wanted, tokens, silent)
    assert [kl, *each] == pytest.approx(expected, rel=1e-3)
    assert len({round(one, 9) for one in each}) == len(each)


def test_small_steps_are_drawn_towards_the_ratio_of_all() -> None:
    wanted = [Step(0, "a", 0.1), Step(1, "a", 0.1), Step(2, "a", 0.001), Step(5, "b", -0.1)]
    found = ratios(wanted, 1.0, [1.2, 1.2, 1.05, 0.9])
    average, overall = 0.301 / 4, 0.55 / 0.301
    assert found[0] == found[1] == pytest.approx((0.2 + average * overall) / (0.1 + average))
    assert found[5] == pytest.approx((0.1 + average * overall) / (0.1 + average))
    assert overall < found[2] < 1.5 * overall  # by itself it would be 50
    assert ratios(wanted, 1.0, [1.3, 1.3, 0.5, 0.9])[2] == pytest.approx(0.25 * (0.6 - 0.5 + 0.1) / 0.301)
    assert ratios(wanted, 1.0, [0.9, 0.9, 1.0, 1.1]) == {} == ratios([], 1.0, [])


def test_a_wrong_prediction_is_put_right(llama: Path, text: str, tmp_path: Path) -> None:
    """MLPs are said to cost six times what they do: only a plan that measures sees it."""
    settings, target, scores = replace(RTN, calib=text), Target(size=110_000), tmp_path / "scores"
    plan_recipe(llama, target, settings, scores=scores)
    for file in scores.glob("block-*.json"):
        found = json.loads(file.read_text())
        wrong = {n: {s: 6 * kl for s, kl in of.items()} if ".mlp." in n else of for n, of in found.items()}
        file.write_text(json.dumps(wrong))
    wrong, right = (plan_recipe(llama, target, replace(settings, measure=n), scores=scores) for n in (0, 1))
    spent = [sum(g.bytes for g in plan.given if ".mlp." in g.patterns[0]) for plan in (wrong, right)]
    assert spent[1] < spent[0]
    assert 0.97 * wrong.plan.bytes < right.plan.bytes <= target.size
    (said,) = [note for note in right.notes if note.startswith("KL measured")]
    before, after = (float(part) for part in said.rpartition(": ")[2].split(", then "))
    assert after < before


def test_losses_are_taken_on_windows_that_matrices_were_not_rounded_for(llama: Path, text: str, tmp_path: Path) -> None:
    """On the few that they were rounded for, error feedback loses less than elsewhere."""
    plan, units = prepared(llama, replace(RTN, method="gptq", calib=text))
    drawn = calibration_tokens(plan, text, 0, spare=8)
    halves = drawn.seen.split(len(drawn.seen) // 2)
    found = {}
    for name, held_out in (("seen", halves[0]), ("unseen", halves[1])):
        of = scored(plan, units, Drawn(halves[0], held_out), tmp_path / name, silent).scores
        found[name] = sum(schemes["int3-g32"] for module, schemes in of.items())
    assert found["seen"] < 0.9 * found["unseen"], found


def test_gradients_that_do_not_exist_count_nothing(text: str, tmp_path: Path) -> None:
    """Of Gemma 3n's roots at 0; its blocks also hand keys and values on, each copy its own."""
    model = tmp_path / "model"
    tiny_model("gemma3n_text").save_pretrained(model)
    save_tokenizer(model)
    found = plan_recipe(model, Target(size=472_000), replace(RTN, calib=text, measure=1))
    (said,) = [note for note in found.notes if note.startswith("KL measured")]
    assert 0.5 < float(said.split(",")[0].rpartition(" ")[2]) / found.kl < 2


def test_rounds_that_cannot_be_are_refused(llama: Path, text: str) -> None:
    settings = replace(RTN, calib=text)
    with pytest.raises(RecipeError, match="-1 rounds"):
        plan_recipe(llama, Target(bits=4.5), replace(settings, measure=-1))
    with pytest.raises(RecipeError, match="different sizes"):
        plan_recipe(llama, Target(kl=0.01), replace(settings, measure=1))
