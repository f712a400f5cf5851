"""Rotations: the Hadamard transform itself, whole models that stay the same, and what cannot be rotated."""

from pathlib import Path

import pytest
import torch

from bitwright.api import evaluate, quantize
from bitwright.errors import FormatError, RecipeError, SchemeError
from bitwright.numerics.codec import decode, encode, fit
from bitwright.numerics.hadamard import block_of, hadamard, random_signs, rotated
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import check_rotation
from bitwright.pipeline.run import run
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule
from bitwright.transforms import Awq, Rotate
from bitwright.transforms.rotation import ROTATABLE, Rotation
from conftest import make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}


def sylvester(n: int) -> torch.Tensor:
    """H by its definition, float64."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    h = sylvester(n // 2)
    return torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5


@pytest.mark.parametrize(("K", "block"), [(1, 1), (8, 8), (96, 32), (352, 32), (768, 256), (24, 2)])
def test_the_transform_is_sylvesters_matrix_and_its_own_inverse(K: int, block: int) -> None:
    x = torch.randn(3, 2, K, generator=torch.Generator().manual_seed(K))
    before = x.clone()
    expected = x.double() @ torch.block_diag(*[sylvester(block)] * (K // block))
    torch.testing.assert_close(hadamard(x, block).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert hadamard(x.bfloat16(), block).dtype == torch.bfloat16


@pytest.mark.parametrize(("K", "block"), [(8, 3), (8, 16), (8, 0), (12, 8)])
def test_blocks_that_do_not_fit(K: int, block: int) -> None:
    with pytest.raises(SchemeError, match="no Hadamard rotation"):
        hadamard(torch.zeros(K), block)


def test_random_rotations_are_orthogonal_and_seeded() -> None:
    eye = torch.eye(96)
    R = rotated(eye, random_signs(96, 0))
    torch.testing.assert_close(R @ R.T, eye, rtol=0, atol=1e-6)
    assert torch.equal(random_signs(96, 3), random_signs(96, 3))
    assert not torch.equal(random_signs(96, 3), random_signs(96, 4))
    assert [block_of(K) for K in (1, 96, 768, 4096)] == [1, 32, 256, 4096]


def test_a_rotation_spreads_an_outlier() -> None:
    """What it is for: a weight with a few large columns loses much less at the same bits."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    w[:, [3, 100]] *= 40
    scheme = Scheme.parse("int4-channel")
    turned = rotated(w, random_signs(256, 0))
    errors = [float((v - decode(encode(v, fit(v, scheme), scheme))).square().sum()) for v in (w, turned)]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("family", list(ROTATABLE))
def test_a_rotated_model_is_the_same_model(family: str, online: bool, text: str, tmp_path: Path) -> None:
    """At 8 bits nothing is lost but digits; what is written is evaluated, and the float original is the judge."""
    source = make_checkpoint(tmp_path / "model", family, torch.float32)
    rule = Rule("*", Scheme.parse("int8-channel-f32"), "gptq", transforms=(Rotate(online=online), Awq()))
    plan = preflight(source, Recipe((rule,)), "bitwright" if online else "compressed-tensors", **SMALL)
    done = run(plan, tmp_path / "out", calib=text)
    cost = evaluate(tmp_path / "out", reference=source, text=text, seqlen=32, tokens=512)
    assert cost.kl_mean is not None and cost.kl_mean < 1e-5
    assert done.bits_per_weight == pytest.approx(cost.bits_per_weight * _parameters(tmp_path / "out", source), rel=1e-6)


def _parameters(out: Path, source: Path) -> float:
    """How many more parameters `out` has than its source: an untied head counts twice there."""
    from bitwright.models.streamed import StreamedModel

    counts = [sum(p.numel() for p in StreamedModel(folder).skeleton.model.parameters()) for folder in (out, source)]
    return counts[0] / counts[1]


def test_tied_embeddings_are_untied_and_said_so(llama: Path, text: str, tmp_path: Path) -> None:
    import json

    from transformers import AutoModelForCausalLM

    done = quantize(llama, tmp_path / "out", scheme="int8-channel", method="rotate+gptq", calib=text, **SMALL)
    assert any("unties" in note for note in done.notes)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in {entry.name for entry in done.ledger}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0.05)


def test_data_free_rounding_can_be_rotated(llama: Path, text: str, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", scheme="int8-channel", method="rotate", calib="none")
    cost = evaluate(tmp_path / "out", reference=llama, text=text, seqlen=32, tokens=512)
    assert cost.kl_mean is not None and cost.kl_mean < 1e-3


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_architectures_that_do_not_commute_are_refused(family: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", family)
    with pytest.raises(RecipeError, match="cannot be rotated"):
        quantize(source, tmp_path / "out", scheme="int8-channel", method="rotate+gptq", format="bitwright")
    assert not (tmp_path / "out").exists()


def test_a_wrong_rotation_is_found_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the table wrong for a model, the first block would tell before anything is rounded."""
    plan = preflight(llama, Recipe.uniform("int8-channel", "rotate"), "compressed-tensors")
    check_rotation(plan)
    monkeypatch.setattr(Rotation, "_values", lambda self, made: made)
    with pytest.raises(RecipeError, match="does not commute"):
        check_rotation(plan)


def test_an_online_rotation_needs_a_format_that_can_say_so(llama: Path) -> None:
    rule = Rule("*", Scheme.parse("int8-channel"), "rtn", transforms=(Rotate(online=True),))
    for name in ("compressed-tensors", "gptq"):
        with pytest.raises(FormatError, match="no place for a rotation") as caught:
            preflight(llama, Recipe((rule,)), name)
        assert "bitwright" in str(caught.value)


@pytest.mark.parametrize("family", list(ROTATABLE))
def test_the_proof_does_not_hang_on_the_processor(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bfloat16 calibrates in it; the proof is made in float32 all the same."""
    monkeypatch.setattr("bitwright.plan.preflight.best_dtype", lambda _: torch.bfloat16)
    source = make_checkpoint(tmp_path / "model", family, torch.bfloat16)
    plan = preflight(source, Recipe.uniform("int8-channel", "rotate+gptq"), "compressed-tensors")
    assert plan.skeleton.dtype == torch.bfloat16
    check_rotation(plan)
