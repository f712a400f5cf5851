"""Mixtures of experts: named as their files have them, fused or one by one; each expert judged by the tokens it sees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import bitwright
from bitwright.calibration.block_run import BlockRun
from bitwright.calibration.input_groups import Mixture, groups_of
from bitwright.calibration.observe import FloatStream
from bitwright.calibration.observe_experts import ENOUGH, PRIOR, SAMPLE, statistics_in_order
from bitwright.errors import CheckpointError
from bitwright.models.experts import Experts
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.result import Result
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.transforms.folds import applied, find_folds, readers_of
from conftest import TEXT, save_tokenizer

SIZES = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2, "bos_token_id": 256,
    "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},  # files rename the layer
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "phimoe": {"num_local_experts": 4},  # its router is a subclass of Linear
    "granitemoe": {"num_local_experts": 4},  # files fuse the experts of a layer
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},  # fused, transposed, rows of gate and up in turns, with biases
}


def save(folder: Path, kind: str, change: Callable[[PreTrainedModel], None] = lambda _: None, **sizes: Any) -> Path:
    """A random model of two blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **MIXTURES[kind], **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    change(model)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def quantize(folder: Path, **options: Any) -> tuple[Path, Result]:
    out = folder.with_name("out")
    chosen = {"scheme": "int4-g32", "calib": str(folder / "text.txt"), "samples": 4, "seqlen": 64, **options}
    return out, bitwright.quantize(folder, out, **chosen)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(48)[None] * 5 % 256).logits


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_one_by_one_are_the_model_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "float", kind)
    streamed = StreamedModel(folder)
    ours = streamed.head(streamed.hidden(torch.arange(48)[None] * 5 % 256)[0])
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))
    assert len(streamed.skeleton.experts) == 2


@pytest.mark.parametrize("kind", MIXTURES)
def test_quantized_experts_load(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "float", kind)
    out, result = quantize(folder, method="gptq")
    ours = logits(bitwright.load(out))
    whole = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert 0 < float((ours - whole).norm() / whole.norm()) < 0.2
    if any("one by one" in note for note in result.notes):
        assert kind in ("granitemoe", "gpt_oss")
    else:
        theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
        assert torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()))
    routers = [e for e in result.ledger if e.reason == "a router of experts" and len(e.shape) == 2]
    assert len(routers) == (4 if kind == "qwen2_moe" else 2)
    gates = [e for e in result.ledger if ".experts.0." in e.name and e.action == "quantized"]
    assert len(gates) == 6


def test_the_names_of_files_are_kept(tmp_path: Path) -> None:
    out, _ = quantize(save(tmp_path / "float", "mixtral"), method="rtn", calib="none")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_packed" in load_file(out / "model.safetensors")


def test_load_rounds_the_experts_of_a_float_model_too(tmp_path: Path) -> None:
    model = bitwright.load(save(tmp_path / "float", "gpt_oss"), scheme="int4-g32")
    assert type(model.get_submodule("model.layers.0.mlp.experts.0.up_proj")).__name__ == "QLinear"


def test_a_gram_is_that_of_own_tokens_and_of_all_as_so_many_more(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "mixtral", lambda model: _starve(model, 0, 3))
    streamed, ids = StreamedModel(folder), torch.arange(256).view(4, 64)
    skeleton = streamed.skeleton
    streamed.load(skeleton.outer_names())
    given = [skeleton.embed(ids[:1]), skeleton.embed(ids)][1:]  # a call is known for each number of windows
    streamed.load(skeleton.state_names(0))
    run = BlockRun(skeleton, 0)
    stages = groups_of(run, given[0][:1], list(skeleton.linears(0)))
    assert [type(stage).__name__ for stage in stages] == ["Group", "Group", "Mixture"]
    mixture = stages[2]
    assert isinstance(mixture, Mixture) and len(mixture.names) == 12
    found = {s.names[0]: s for s in statistics_in_order(run, given, mixture, FloatStream(run, list(given), stages))}

    x, index, _ = run.handed(given[0], mixture.name)
    experts = skeleton.model.get_submodule(mixture.name)
    assert isinstance(experts, Experts)
    for e in range(4):
        own = x[(index == e).any(1)]
        assert e != 3 or len(own) == 0
        for name, of in ((f"{e}.gate_proj", x), (f"{e}.down_proj", experts[e].inner(x))):
            rows = (index == e).any(1)
            assert len(x) <= SAMPLE  # all tokens are the sample
            few = len(own) < ENOUGH * 64
            meant = of[rows].T @ of[rows] + few * PRIOR * of.T @ of / len(of)
            seen = found[f"{mixture.name}.{name}"]
            assert seen.tokens == len(own) and seen.borrowed == few * len(x)
            assert seen.gram is not None and seen.drift is not None
            assert torch.allclose(seen.gram * (seen.tokens + seen.borrowed), meant, rtol=1e-3, atol=1e-4)
            assert float(seen.drift.abs().max()) < 1e-6  # the same model


def _starve(model: PreTrainedModel, layer: int, e: int) -> None:
    """Let a router send no token to an expert: its row is far on the wrong side of what all inputs have in common."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.post_attention_layernorm.weight.fill_(1)
        router = block.mlp.gate.weight
        embedded = model.model.embed_tokens.weight
        embedded += 0.5  # what all tokens share
        router[e] = -10.0


def test_an_expert_without_tokens_is_quantized_and_counted(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "mixtral", lambda model: _starve(model, 0, 3))
    _, result = quantize(folder)
    starved = [e for e in result.ledger if e.name.startswith("model.layers.0.block_sparse_moe.experts.3.")]
    assert [e.tokens for e in starved] == [0, 0, 0] and all(
        e.borrowed and e.statistics == "sequential" for e in starved
    )
    by_expert = [
        e.tokens for e in result.ledger if e.name.startswith("model.layers.0.") and e.name.endswith("w1.weight")
    ]
    assert sum(by_expert) == 2 * 4 * 64  # two experts a token
    assert all(e.loss is not None and e.loss_rtn is not None and e.loss <= 1.01 * e.loss_rtn for e in starved)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks tensor.*experts\.2\.up_proj.* there for 3 experts .* means 4"):
        quantize(folder)


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_more_experts_in_the_config_than_in_the_file(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "float", kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(CheckpointError, match=r"there for 4 experts .* means 5|shape \(4, .* means \(5"):
        quantize(folder)


def test_more_experts_in_the_file_than_in_the_config(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "mixtral")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_local_experts": 3}))
    with pytest.raises(CheckpointError, match=r"shape|no such tensor"):
        quantize(folder)


def test_a_fused_tensor_of_the_wrong_rank_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "granitemoe")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    tensors[name] = tensors[name].flatten(0, 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"input_linear.*shape \(768, 64\)"):
        quantize(folder)


@pytest.mark.parametrize(("kind", "readers"), [("mixtral", 1 + 4 * 2), ("qwen2_moe", 1 + 4 * 2 + 3)])
@torch.no_grad()
def test_the_norm_before_a_mixture_of_experts_is_a_fold(kind: str, readers: int, tmp_path: Path) -> None:
    """Router, gate and up of every expert, shared expert and its gate are scaled; transformers computes the same logits."""
    source, scaled = save(tmp_path / "model", kind), tmp_path / "scaled"
    before = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    streamed = StreamedModel(source)
    streamed.load(streamed.skeleton.outer_names())
    hidden = streamed.skeleton.embed(torch.arange(64).view(2, 32))
    tensors = load_file(source / "model.safetensors")
    names = streamed.names
    for index in range(len(streamed.skeleton)):
        streamed.load(streamed.skeleton.state_names(index))
        found = [
            f for f in find_folds(streamed.skeleton, index, hidden) if f.producer.endswith("post_attention_layernorm")
        ]
        assert [len(fold.readers) for fold in found] == [readers]
        s = 10 ** (torch.rand(64, generator=torch.Generator().manual_seed(index)) * 2 - 1)
        state = {name: tensors[names[name]] for name in streamed.skeleton.state_names(index)}
        changed, _ = applied(found[0], s, state, readers_of(streamed.skeleton, index))
        tensors |= {names[name]: tensor for name, tensor in changed.items()}
    shutil.copytree(source, scaled)
    save_file(tensors, scaled / "model.safetensors", metadata={"format": "pt"})
    after = logits(AutoModelForCausalLM.from_pretrained(scaled, dtype=torch.float32))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_awq_scales_the_norm_before_experts(tmp_path: Path) -> None:
    """Experts that share the norm get the same scales, the float router takes them in, and the ledger says both."""
    out, result = quantize(save(tmp_path / "float", "qwen2_moe", _outlying), scheme="int3-g32", method="awq+rtn")
    done = {e.name: e.transforms for e in result.ledger if e.action == "quantized"}
    gates = {
        text
        for name, text in done.items()
        if ".layers.0." in name and name.endswith(("gate_proj.weight", "up_proj.weight"))
    }
    assert len(gates) == 1 and "awq" in gates.pop()
    assert all(e.reason.endswith("transformed") for e in result.ledger if e.name.endswith("mlp.gate.weight"))
    whole = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32))
    lost = float((logits(bitwright.load(out)) - whole).norm())
    shutil.rmtree(out)
    plain, _ = quantize(tmp_path / "float", scheme="int3-g32", method="rtn")
    assert lost < float((logits(bitwright.load(plain)) - whole).norm())


def _outlying(model: PreTrainedModel) -> None:
    """Some channels behind the norms are large, as in trained models."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.fill_(1)[::16] = 30


def test_no_expert_has_a_fold_that_another_s_tokens_disprove(tmp_path: Path) -> None:
    """gpt-oss clamps what up gives: no scales pass, for experts without a token in the batch neither."""
    streamed = StreamedModel(save(tmp_path / "model", "gpt_oss", _never_third, num_hidden_layers=1))
    streamed.load(streamed.skeleton.outer_names())
    hidden = streamed.skeleton.embed(torch.arange(32)[None])
    streamed.load(streamed.skeleton.state_names(0))
    found = find_folds(streamed.skeleton, 0, hidden)
    assert "post_attention_layernorm" in str(found)
    assert not [fold for fold in found if ".experts." in fold.producer]


def _never_third(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.router.bias.data[3] = -1e3


def test_experts_that_the_files_hold_transposed(tmp_path: Path) -> None:
    """As Qwen's files for Qwen3-VL-MoE; those that transformers saves are not."""
    folder = tmp_path / "float"
    tiny_model("qwen3_vl_moe").save_pretrained(folder)
    save_tokenizer(folder)
    ids = torch.arange(48)[None] * 5 % 256
    streamed = StreamedModel(folder)
    saved = streamed.head(streamed.hidden(ids)[0])
    tensors = load_file(folder / "model.safetensors")
    turned = {name: t.mT.contiguous() if t.ndim == 3 and ".experts." in name else t for name, t in tensors.items()}
    save_file(turned, folder / "model.safetensors", {"format": "pt"})
    streamed = StreamedModel(folder)
    assert torch.equal(streamed.head(streamed.hidden(ids)[0]), saved)
    theirs = logits(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
    assert torch.allclose(saved, theirs, atol=1e-4 * float(theirs.abs().max()))


def test_preflight_counts_every_expert_s_gram_where_folds_hold_all_at_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "float", "mixtral", intermediate_size=512, num_local_experts=8)
    peaks = [
        preflight(folder, Recipe.uniform("int4-g32", method), "compressed-tensors", samples=2, seqlen=32).peak_memory
        for method in ("gptq", "awq+gptq")
    ]
    assert peaks[1] - peaks[0] > 6 * 4 * 512 * 512
