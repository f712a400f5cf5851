"""Targets of llama-quantize: codebooks of IQ1 to IQ3, block types of single tensors, quantized sources, and what files say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.gguf.file_types import Place, type_in
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.templates import check_names, read_templates
from bitwright.methods import METHODS, check_serves
from bitwright.methods.gptq import gptq
from bitwright.methods.search import search
from bitwright.numerics.codec import decode
from bitwright.numerics.lattice import SIGNED, lattice, nearest
from bitwright.numerics.scheme import GRIDS, Scheme
from conftest import make_checkpoint

IN_RUNS = [name for name, grid in GRIDS.items() if grid.run > 1]


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout or done.stderr)
    return found


# ----------------------------------------------------------------------------------------------------------- codebooks


def least(x: Tensor, u: Tensor, grid: str) -> float:
    """The least weighted squared error of all entries and signs, one run of eight after the other."""
    one = lattice(grid)
    d, total = one.points.shape[2], 0.0
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * SIGNED) if one.even else torch.empty(0)
    for run_, weight in zip(x, u.expand_as(x), strict=True):
        best = []
        for points in one.points:
            if one.even:  # every even number of negative signs
                turned = run_ * signs[signs.prod(1) > 0]
                parts = [
                    (weight[None, at : at + d, None] * (turned[:, at : at + d, None] - points.T[None]).square())
                    for at in range(0, SIGNED, d)
                ]
                best.append(float(sum(part.sum(1).amin(1) for part in parts).min()))
            else:
                near = run_.abs() if one.signs else run_
                cut = zip(near.split(d), weight.split(d), strict=True)
                best.append(sum(float(((part - points).square() * w).sum(1).min()) for part, w in cut))
        total += min(best)
    return total


@pytest.mark.parametrize("grid", IN_RUNS)
def test_the_nearest_entry_is_found(grid: str) -> None:
    """Beside all entries with all signs that a block can hold: of those near by, and one sign turned, at most 4 % are lost."""
    torch.manual_seed(0)
    rows = 4 if GRIDS[grid].run == 32 else 12
    x, u = 1.5 * torch.randn(rows, 8), torch.rand(8) + 0.1
    if GRIDS[grid].run == 32:  # one direction for four runs: these are alike
        codes = torch.stack([nearest(row.repeat(4), grid, u.repeat(4))[:8] for row in x])
    else:
        codes = nearest(x, grid, u)
    v = torch.tensor(GRIDS[grid].levels)[codes.long()]
    assert bool((lattice(grid).index(codes)[1] >= 0).all())
    if lattice(grid).even:
        assert bool(((v < 0).sum(1) % 2 == 0).all())
    assert float(((v - x).square() * u).sum()) <= 1.04 * least(x, u, grid) + 1e-5


@pytest.mark.parametrize("grid", ["iq1_s", "iq2_xxs", "iq3_s"])
def test_error_feedback_reaches_from_run_to_run(grid: str) -> None:
    """GPTQ's loss on correlated inputs is far below that of a search, and no code leaves the codebook."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(16, 256, generator=generator), torch.randn(600, 256, generator=generator)
    x = x @ (torch.eye(256) + 0.15 * torch.randn(256, 256, generator=generator))
    gram, scheme = x.T @ x / len(x), Scheme.parse(grid)
    q, plain = gptq(w, gram, scheme).q, search(w, gram, scheme).q
    lost = [float((((decode(one) - w) @ gram) * (decode(one) - w)).sum()) for one in (q, plain)]
    assert lost[0] < 0.75 * lost[1]
    assert bool((lattice(grid).index(q.codes)[1] >= 0).all())


def test_methods_that_choose_codes_one_by_one_are_refused() -> None:
    for method in METHODS:
        if method in ("gptq", "gptaq", "search", "rtn"):
            check_serves(method, Scheme.parse("iq2_xs"))
        elif method != "hqq":
            with pytest.raises(RecipeError):
                check_serves(method, Scheme.parse("iq2_xs"))


# ------------------------------------------------------------------------------------------------------------- mixes

# llama-quantize's dry run of a Llama with 16 blocks, 4 heads to a key, a head of its own and no importance matrix.
TYPES_OF = {
    "IQ1_S": "Q5_K Q2_K IQ1_S IQ1_S Q4_K IQ2_XXS Q2_K IQ1_S IQ1_S IQ1_S",
    "IQ2_XS": "Q5_K Q2_K IQ2_XS IQ2_XS Q4_K IQ2_XS Q2_K IQ2_XS IQ2_XS IQ2_XS",
    "IQ2_S": "Q5_K IQ3_S IQ2_XS IQ2_XS Q4_K IQ3_S IQ3_S IQ2_XS IQ2_XS IQ2_XS",
    "IQ2_M": "Q5_K IQ3_S IQ2_S IQ2_S Q4_K IQ3_S IQ3_S IQ2_S IQ2_S IQ2_S",
    "IQ3_XXS": "Q5_K IQ3_S IQ2_S IQ2_S Q4_K IQ3_S Q4_K Q3_K IQ3_XXS IQ3_XXS",
    "IQ3_XS": "Q6_K IQ3_S IQ3_XXS IQ3_XXS Q4_K IQ3_S IQ3_S IQ3_S IQ3_S IQ3_XXS",
    "IQ3_M": "Q6_K IQ3_S IQ3_S IQ3_S Q4_K Q4_K Q4_K IQ3_S IQ3_S IQ3_S",
    "Q2_0": "Q6_K Q4_K Q2_0 Q2_0 Q2_0 Q2_0 Q2_0 Q2_0 Q2_0 Q2_0",
    "MXFP4_MOE": "Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0",
}
PLACES = [
    ("output", 0), ("token_embd", 0), ("attn_q", 5), ("attn_k", 5), ("attn_v", 5), ("attn_output", 5), ("ffn_down", 0),
    ("ffn_down", 5), ("ffn_up", 1), ("ffn_gate", 5),
]  # fmt: skip


@pytest.mark.parametrize("mix", TYPES_OF)
def test_mixes_are_llama_quantize_s(mix: str) -> None:
    found = [type_in(mix, Place(part, index, 16, 4, False, False)) for part, index in PLACES]
    assert " ".join(found) == TYPES_OF[mix]


def test_experts_alone_become_mxfp4() -> None:
    assert type_in("MXFP4_MOE", Place("ffn_up", 1, 8, 1, False, False, experts=4, stacked=True)) == "MXFP4"


# ------------------------------------------------------------------------------------------------------- single tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("models") / "m", "llama", **shape)


@pytest.fixture(scope="module")
def file(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Q8_0."""
    out = tmp_path_factory.mktemp("files") / "q8.gguf"
    run("quantize", str(llama), str(out), "--scheme", "q8_0", "--method", "rtn", "--calib", "none")
    return out


def types(path: Path) -> dict[str, str]:
    return {name: t.type.name for name, t in GgufFile(path).tensors.items() if len(t.shape) > 1}


def test_single_tensors_get_types_of_their_own(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    named = ["--tensor-type", r"blk\.1\.attn_[QK]=q5_1", "--tensor-type", "attn=q8_0", "--token-embedding-type", "f16"]
    run("quantize", str(llama), str(out), "--scheme", "q4_0", "--method", "rtn", "--calib", "none", *named)
    found = types(out)
    assert found["blk.1.attn_q.weight"] == found["blk.1.attn_k.weight"] == "Q5_1"  # the first that matches wins
    assert found["blk.0.attn_q.weight"] == found["blk.1.attn_v.weight"] == "Q8_0"
    assert found["token_embd.weight"] == "F16" and found["blk.0.ffn_up.weight"] == "Q4_0"
    assert GgufFile(out).keys["general.file_type"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tensor-type", "attn_v=q6k"], "did you mean q6_k"), (["--tensor-type", "attn_v=q4_k_m"], "a mix of block types"),
        (["--tensor-type", "nothing=q6_k"], "matches nothing"), (["--tensor-type", "(=q6_k"], "no regular expression"),
        (["--tensor-type", "attn_v"], "NAME=TYPE"), (["--output-tensor-type", "q9"], "no block type"),
    ],
)  # fmt: skip
def test_types_that_mean_nothing_are_refused(arguments: list[str], says: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    refused = run("quantize", str(llama), str(out), "--scheme", "q4_0", "--calib", "none", *arguments, code=2)
    assert says in json.dumps(refused) and not out.exists()


# ------------------------------------------------------------------------------------------------------ quantized sources


def test_a_quantized_file_is_a_source_if_asked(file: Path, tmp_path: Path) -> None:
    how = ["--scheme", "q4_0", "--method", "search", "--calib", "none"]
    refused = run("quantize", str(file), str(tmp_path / "a.gguf"), *how, code=2)
    assert "--requantize" in refused["remedy"]
    refused = run("imatrix", str(file), str(tmp_path / "a.imatrix"), code=2)  # which has no such option
    assert "float original" in refused["remedy"] and "--requantize" not in refused["remedy"]
    run(
        "quantize", str(file), str(tmp_path / "a.gguf"), *how, "--requantize", code=1
    )  # the embedding fills no block of Q6_K
    entries = [json.loads(line) for line in (tmp_path / "a.ledger.jsonl").read_text().splitlines()]
    assert {entry["source"] for entry in entries if entry["action"] == "quantized"} == {"q8_0"}
    meant = search(GgufFile(file).read("blk.0.ffn_up.weight"), None, Scheme.parse("q4_0"), objective="mse", steps=2).q
    assert torch.equal(GgufFile(tmp_path / "a.gguf").read("blk.0.ffn_up.weight"), decode(meant))


def test_a_directory_is_made_of_a_file(llama: Path, file: Path, tmp_path: Path) -> None:
    """transformers loads it, and it computes what the model did before it became a file."""
    out = tmp_path / "d"
    how = [
        "--scheme",
        "int8-g32",
        "--method",
        "rtn",
        "--calib",
        "none",
        "--requantize",
        "--format",
        "compressed-tensors",
    ]
    run("quantize", str(file), str(out), *how)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, meant = (AutoModelForCausalLM.from_pretrained(path)(ids).logits.float() for path in (out, llama))
    assert (found - meant).norm() < 0.05 * meant.norm()
    assert AutoTokenizer.from_pretrained(out)("a fox")["input_ids"]


# --------------------------------------------------------------------------------------------------------- what files say


def test_inspect_shows_tokenizer_templates_and_keys(file: Path) -> None:
    found = run("inspect", str(file))
    assert found["architecture"] == "llama" and found["tokenizer"]["kind"] == "byte-level BPE"
    assert found["keys"]["general.file_type"] == 7 and found["types"]["q8_0"] > 10
    assert found["keys"]["tokenizer.ggml.tokens"][-1].startswith("…") and len(found["keys"]) == len(GgufFile(file).keys)
    assert {t["type"] for t in found["tensors"]} == {"q8_0", "f32"}
    shown = CliRunner().invoke(app, ["inspect", str(file)]).output
    assert "tokenizer: byte-level BPE" in shown and "llama.block_count = 2" in shown


def test_two_templates_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two chat templates"):
        read_templates({"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.default": "{{ 2 }}"})
    same = [{"name": "rag", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": same}))
    with pytest.raises(FormatError, match="'rag'"):
        check_names(tmp_path)


def test_damaged_metadata_is_read_or_refused() -> None:
    from bench.gguf_fuzz import fuzz

    met, failures = fuzz(range(500_000, 500_080))
    assert not failures
    assert met["read"] > 10 and met["CheckpointError"] > 10
