"""A factor on the last norm: the one that is wanted, within its budget, and nothing else in the file changes."""

from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.api import quantize
from bitwright.errors import FormatError, RecipeError
from bitwright.files.checkpoint import Checkpoint
from bitwright.gguf.reader import GgufFile
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.plan.recipe import Recipe
from bitwright.transforms.output_temperature import STEP, Three, factor, with_output_temperature
from conftest import make_checkpoint

NORM = "model.norm.weight"


def at_three(least: float, flat: float, nearest: float) -> Three:
    """A parabola least · (1 + ...) at the three factors."""
    a, b, c = (least + flat / 2 * (s - nearest) ** 2 for s in (1 - STEP, 1.0, 1 + STEP))
    return a, b, c


@pytest.mark.parametrize("sign", [1, -1])
def test_the_budget_is_spent_and_no_more(sign: int) -> None:
    kl, line = at_three(0.01, 5.0, 1.002), (1 - sign * STEP, 1.0, 1 + sign * STEP)
    for budget in (0.0, 0.05, 0.2):
        s = factor(kl, line, budget)
        assert s == pytest.approx(1.002 - sign * sqrt(2 * budget * 0.01 / 5), abs=1e-6)
        assert 0.01 + 2.5 * (s - 1.002) ** 2 == pytest.approx(0.01 * (1 + budget), rel=1e-6)


def test_what_will_be_blurred_is_not_made_less_sure_twice() -> None:
    line = (1 - STEP, 1.0, 1 + STEP)
    for nearest, counted in ((0.996, 1.0), (1.004, 1.004)):
        s = factor(at_three(0.01, 5.0, nearest), line, 0.05, blurs=True)
        assert s == pytest.approx(counted - sqrt(2 * 0.05 * 0.01 / 5), abs=1e-6)


def test_nobody_goes_beyond_what_the_text_wants() -> None:
    assert factor(at_three(0.01, 5.0, 1.0), at_three(3.0, 4.0, 0.99), 0.5) == pytest.approx(0.99, abs=1e-6)


def sides(family: str, tmp_path: Path, **changes: object) -> tuple[Skeleton, dict[str, Tensor], dict[str, Tensor]]:
    """A small model, what is outside its blocks, and its output head after much rounding."""
    more = {"initializer_range": 0.2, "tie_word_embeddings": False, **changes}
    folder = make_checkpoint(tmp_path / "m", family, torch.float32, **more)
    skeleton, checkpoint = Skeleton(read_config(folder), torch.float32), Checkpoint(folder)
    weights = {name: checkpoint.read(name) for name in skeleton.outer_names()}
    return skeleton, weights, {"lm_head.weight": (weights["lm_head.weight"] / 0.1).round() * 0.1}


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_factor_is_the_best_that_the_budget_allows(family: str, tmp_path: Path) -> None:
    """Against a fine grid of factors on the logits themselves; Gemma's norm multiplies by 1 + weight."""
    skeleton, weights, rounded = sides(family, tmp_path)
    g = torch.Generator().manual_seed(0)
    original, tokens = torch.randn(8, 32, 64, generator=g), torch.randint(257, (8, 32), generator=g)
    given = original + 0.2 * torch.randn(8, 32, 64, generator=g)
    before = {name: t.clone() for name, t in (weights | rounded).items()}
    found = with_output_temperature(skeleton, weights, rounded, (given.split(3), original.split(3)), tokens, 0.05)
    assert list(found) == [NORM] and all(torch.equal(t, (weights | rounded)[name]) for name, t in before.items())
    skeleton.load(weights)
    log_p = skeleton.head(original)[:, :-1].log_softmax(-1)
    skeleton.load(weights | rounded)
    logits = skeleton.head(given)[:, :-1]
    skeleton.load(found)
    s = float((skeleton.head(given)[:, :-1] * logits).sum() / logits.square().sum())
    grid = {}
    for i in range(-400, 401):
        log_q = (logits * (1 + i / 4000)).log_softmax(-1)
        loss = -log_q.gather(-1, tokens[:, 1:, None]).mean()
        grid[1 + i / 4000] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), float(loss)
    allowed = 1.05 * min(kl for kl, _ in grid.values())
    best = min((loss, t) for t, (kl, loss) in grid.items() if kl <= allowed)[1]
    assert abs(s - 1) > 0.002 and s == pytest.approx(best, abs=0.15 * abs(best - 1))


def test_a_soft_cap_is_refused(tmp_path: Path) -> None:
    skeleton, weights, rounded = sides("gemma2", tmp_path, final_logit_softcapping=3.0)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RecipeError, match="no factor on the last norm"):
        with_output_temperature(
            skeleton, weights, rounded, ([hidden], [hidden]), torch.zeros(1, 4, dtype=torch.long), 0.05
        )


def test_only_the_last_norm_changes(tmp_path: Path, text: str) -> None:
    source = make_checkpoint(tmp_path / "source", initializer_range=0.2)
    recipe, files = tmp_path / "temper.toml", []
    recipe.write_text("temper = 0.05\n")
    for name, rules in (("plain", None), ("tempered", recipe)):
        files.append(tmp_path / f"{name}.gguf")
        done = quantize(source, files[-1], scheme="q4_0", calib=text, samples=16, seqlen=32, recipe=rules)
    plain, other = (GgufFile(file) for file in files)
    assert [n for n in plain.tensors if not torch.equal(plain.read(n), other.read(n))] == ["output_norm.weight"]
    ratio = other.read("output_norm.weight") / plain.read("output_norm.weight")
    assert ratio.std() < 1e-5 and 1e-4 < abs(float(ratio.mean()) - 1) < 0.2
    assert next(e for e in done.ledger if e.name == NORM).reason == "outside the blocks, transformed"


def test_where_it_cannot_be(llama: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.toml"
    for content, says in (("temper = 2.0", "between 0 and 1"), ("temper = true", "not a fraction")):
        file.write_text(content)
        with pytest.raises(RecipeError, match=says):
            Recipe.of(file, scheme="int4-g32", method="gptaq")
    file.write_text("temper = 0.05")
    with pytest.raises(RecipeError, match="use --method gptaq"):
        quantize(llama, tmp_path / "a.gguf", scheme="q4_0", method="gptq", calib=text, recipe=file)
    with pytest.raises(FormatError, match="keeps the last norm"):
        quantize(llama, tmp_path / "a", scheme="int4-g32", method="gptaq", calib=text, recipe=file)
