"""Methods broken on purpose: the guard must see it, by the matrix and by the block, take the plainer one and say so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.calibration.input_statistics import Inputs
from bitwright.cli.app import app
from bitwright.formats import Layer
from bitwright.methods import METHODS, Outcome, gptaq, gptq, rtn, search
from bitwright.numerics.codec import decode
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.guard import block_error, judge
from bitwright.pipeline.ledger import Entry
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.rule import Rule
from conftest import make_checkpoint

SMALL: dict[str, Any] = {"samples": 8, "seqlen": 32}


def backwards(w: Tensor, gram: Tensor | None, scheme: Scheme, *, fast: bool = False) -> Outcome:
    """Every row the wrong way round."""
    return rtn(w.flip(1), None, scheme)


def fitted_to_what_it_saw(w: Tensor, gram: Tensor, scheme: Scheme, *, fast: bool = False) -> Outcome:
    """Hardly wrong on the calibration tokens, and by three times the weight where these do not reach."""
    values, vectors = torch.linalg.eigh(gram.double())
    unseen = vectors[:, values < 1e-6 * values.max()].float()
    noise = torch.randn(len(w), unseen.shape[1], generator=torch.Generator().manual_seed(0))
    return gptq(w + 3 * float(w.std()) * noise @ unseen.T, gram, scheme)


def quantized(entries: list[Entry]) -> list[Entry]:
    return [e for e in entries if e.action == "quantized"]


def test_a_broken_method_is_caught_at_the_matrix(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "search", scheme="int4-g32", method="search", calib=text, **SMALL)
    monkeypatch.setitem(METHODS, "gptq", backwards)
    arguments = ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "int4-g32", "--method", "gptq"]
    said = CliRunner().invoke(app, [*arguments, "--calib", text, "--samples", "8", "--seqlen", "32", "--json"])
    assert said.exit_code == 1
    fallbacks = json.loads(said.stdout)["fallbacks"]
    entries = quantized(
        [Entry(**json.loads(line)) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    )
    assert len(fallbacks) == len(entries) == 3 * 7
    assert all("gptq -> search: on the same statistics gptq loses" in fallback for fallback in fallbacks)
    for e in entries:
        assert e.method == "search" and e.loss is not None and e.loss_rtn is not None and e.loss <= 1.01 * e.loss_rtn
    kl = [
        evaluate(tmp_path / name, reference=llama, text=text, seqlen=32, tokens=512).kl_mean
        for name in ("out", "search")
    ]
    assert kl[0] == pytest.approx(kl[1], rel=0.05)


def test_a_method_that_only_fits_its_tokens_is_caught_at_the_block(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "gptq", fitted_to_what_it_saw)
    done = quantize(llama, tmp_path / "out", scheme="int4-g32", method="gptq", calib=text, samples=1, seqlen=32)
    entries = quantized(done.ledger)
    assert len(done.fallbacks) == len(entries)
    assert all("gptq -> search: on windows that it did not see" in fallback for fallback in done.fallbacks)
    for e in entries:
        assert e.method == "search" and e.block_error is not None and e.block_error_search is not None
        assert e.block_error == e.block_error_search


def test_a_replacement_does_not_hide_another_fallback(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that do not fill q4_k's blocks get another type: that is still said where the block is replaced."""
    monkeypatch.setitem(METHODS, "gptq", fitted_to_what_it_saw)
    out = tmp_path / "out.gguf"
    done = quantize(llama, out, scheme="q4_k_m", method="gptq", calib=text, samples=1, seqlen=32)
    replaced = [fallback for fallback in done.fallbacks if "on windows that it did not see" in fallback]
    assert replaced and all("do not fill its blocks" in fallback for fallback in replaced)


def test_broken_tuning_is_caught_at_the_block(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> dict[str, QTensor]:
        start: dict[str, QTensor] = arguments[4]
        return {name: QTensor(q.codes.flip(1), q.scales, q.scheme, q.shape) for name, q in start.items()}

    monkeypatch.setattr("bitwright.pipeline.tune_block.tune", broken)
    done = quantize(llama, tmp_path / "out", scheme="int4-g32", method="autoround", calib=text, **SMALL)
    assert {e.method for e in quantized(done.ledger)} == {"search"}
    assert len(done.fallbacks) == 3 * 7


@pytest.mark.parametrize("method", ["gptq", "gptaq", "autoround", "awq+gptq"])
def test_a_method_that_works_is_left_alone(method: str, llama: Path, text: str, tmp_path: Path) -> None:
    done = quantize(llama, tmp_path / "out", scheme="int3-g32", method=method, calib=text, samples=32, seqlen=32)
    assert not done.fallbacks
    for e in quantized(done.ledger):
        assert e.method == method.split("+")[-1] and e.arithmetic in ("float32", "bfloat16")
        assert e.loss_search is not None and e.block_error is not None and e.block_error_search is not None
        assert e.block_error < e.block_error_search


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """w, the float model's inputs, and the quantized one's."""
    g = torch.Generator().manual_seed(0)
    original = torch.randn(512, 64, generator=g) @ (torch.eye(64) + 0.2 * torch.randn(64, 64, generator=g))
    given = original @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=g))
    return torch.randn(128, 64, generator=g) * 0.05, original, given


def matrix_of_rule(method: str, scheme: Scheme) -> PlannedTensor:
    layer = Layer("m", 128, 64, scheme)
    return PlannedTensor(
        "m.weight", "m.weight", 0, torch.float32, (128, 64), "quantized", "", layer, Rule("*", scheme, method)
    )


def test_what_aims_elsewhere_is_judged_by_its_aim() -> None:
    """GPTAQ leaves w, and by that loses more of w's own output than a search; of the float model's output it loses less."""
    (w, original, given), scheme = problem(), Scheme.parse("int8-channel")
    gram, drift = given.T @ given / 512, (original - given).T @ given / 512
    inputs = Inputs(("m",), 512, gram, drift)
    q = gptaq(w, gram, scheme, drift=drift).q
    judged = judge(torch.float32, matrix_of_rule("gptaq", scheme), w, q, inputs)
    assert judged.losses["gptaq"] > 10 * judged.losses["search"] and judged.best == "gptaq"
    for wrong in (search(w, gram, scheme).q, gptaq(w, gram, scheme, drift=-drift).q):
        assert judge(torch.float32, matrix_of_rule("gptaq", scheme), w, wrong, inputs).best != "gptaq" or torch.equal(
            wrong.codes, search(w, gram, scheme).q.codes
        )
    assert judge(torch.float32, matrix_of_rule("gptq", scheme), w, q, inputs).best == "search"


def test_a_difference_as_small_as_bfloat16_has_is_none() -> None:
    """Weights on the grid come back from a search exactly, and slightly moved from another method."""
    (w, original, _), scheme = problem(), Scheme.parse("q8_0")
    gram = original.T @ original / 512
    exact = search(w, gram, scheme).q
    for share, best in ((1e-3, "gptq"), (1e-2, "search")):
        moved = replace(exact, scales=replace(exact.scales, scale=exact.scales.scale * (1 + share)))
        inputs = Inputs(("m",), 512, gram)
        assert judge(torch.float32, matrix_of_rule("gptq", scheme), decode(exact), moved, inputs).best == best


def test_nothing_is_known_and_nothing_replaced() -> None:
    (w, _, _), scheme = problem(), Scheme.parse("int4-g32")
    judged = judge(torch.float32, matrix_of_rule("search", scheme), w, backwards(w, None, scheme).q, Inputs())
    assert judged.best == "search" and judged.losses["search"] > judged.losses["rtn"]


def test_a_massive_activation_counts_as_one_token() -> None:
    meant = torch.ones(1, 4, 8)
    meant[0, 0] = 1000
    given = meant.clone()
    given[0, 0] *= 1.1  # a hundredth of the square of one token in four
    assert block_error(lambda x: x, [given], [meant]) == pytest.approx(0.01 / 4, rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int8-channel", "int3-g32-asym"])
def test_correcting_does_not_grow_with_depth(scheme: str, text: str, tmp_path: Path) -> None:
    """Were every input of a block observed before any of its matrices is quantized, o_proj would make up for what q, k and v
    have made up for already, and down_proj for what gate and up have: each block would overshoot, the next one more.
    """
    source = make_checkpoint(tmp_path / "model", num_hidden_layers=32, initializer_range=0.15)
    kl, lost = {}, {}
    for method in ("gptq", "gptaq"):
        done = quantize(source, tmp_path / method, scheme=scheme, method=method, calib=text, samples=48, seqlen=32)
        lost[method] = [e.loss for e in quantized(done.ledger) if e.loss is not None]
        kl[method] = evaluate(tmp_path / method, reference=source, text=text, seqlen=32, tokens=512).kl_mean
        assert not done.fallbacks
    print(kl, max(lost["gptaq"]), max(lost["gptq"]))
    assert kl["gptaq"] is not None and kl["gptq"] is not None and kl["gptaq"] <= kl["gptq"]
    if scheme == "int8-channel":
        assert max(lost["gptaq"]) < 1e-3
