"""Folds leave every supported family's float model as it was; what is no fold is not taken for one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.models.layers import matrix_of
from bitwright.models.streamed import StreamedModel
from bitwright.transforms.folds import Fold, applied, find_folds
from conftest import FAMILIES, make_checkpoint

# Family -> producer (leaf), readers (leaves) of a block's folds.
NORMS = {
    "llama": [("input_layernorm", "q_proj k_proj v_proj"), ("post_attention_layernorm", "gate_proj up_proj")],
    "gemma2": [("input_layernorm", "q_proj k_proj v_proj"), ("pre_feedforward_layernorm", "gate_proj up_proj")],
    "phi": [("input_layernorm", "q_proj k_proj v_proj fc1")],
    "gpt2": [("ln_1", "c_attn"), ("ln_2", "c_fc")],
    "gpt_neox": [("input_layernorm", "query_key_value"), ("post_attention_layernorm", "dense_h_to_4h")],
    "opt": [("self_attn_layer_norm", "q_proj k_proj v_proj"), ("final_layer_norm", "fc1")],
    "phi3": [("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "gate_up_proj")],
}
ROWS = {
    "llama": [("v_proj", "o_proj"), ("up_proj", "down_proj")],
    "gemma2": [("v_proj", "o_proj"), ("up_proj", "down_proj")],
    "phi": [("v_proj", "dense")],  # between fc1 and fc2 stands a GELU
    "gpt2": [("c_attn", "c_proj")],
    "gpt_neox": [],
    "opt": [("v_proj", "out_proj"), ("fc1", "fc2")],  # ReLU lets scales pass
    "phi3": [("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")],
}


def opened(folder: Path, dtype: torch.dtype) -> tuple[StreamedModel, Tensor]:
    """A checkpoint with its first block loaded, and what that block is given."""
    streamed = StreamedModel(folder, dtype)
    streamed.load(streamed.skeleton.outer_names())
    hidden = streamed.skeleton.embed(torch.arange(64).view(2, 32))
    streamed.load(streamed.skeleton.state_names(0))
    return streamed, hidden


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(NORMS))
def test_the_folds_of_a_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    streamed, hidden = opened(make_checkpoint(tmp_path / "model", family, dtype), dtype)
    found = find_folds(streamed.skeleton, 0, hidden)
    norms = [(leaf(f.producer), " ".join(map(leaf, f.readers))) for f in found if f.rows is None]
    assert norms == NORMS[family]
    rows = [(leaf(f.producer), leaf(f.readers[0])) for f in found if f.rows is not None]
    assert rows == ROWS[family] or (family == "opt" and rows == ROWS[family][1:])
    assert {f.offset for f in found if f.rows is None} == {1.0 if family.startswith("gemma") else 0.0}


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_fold_leaves_the_float_model_as_it_was(family: str, tmp_path: Path) -> None:
    """Every fold of every block takes scales over two decades; transformers' own model gives the same logits."""
    source = make_checkpoint(tmp_path / "model", family, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.arange(40)[None]
    before = model(ids).logits
    streamed, hidden = opened(source, torch.float32)
    state = dict(model.state_dict())
    count = 0
    for index in range(len(streamed.skeleton)):
        streamed.load(streamed.skeleton.state_names(index))
        linears = streamed.skeleton.linears(index)
        for i, fold in enumerate(find_folds(streamed.skeleton, index, hidden)):
            K = matrix_of(linears[fold.readers[0]], state[f"{fold.readers[0]}.weight"]).shape[1]
            drawn = torch.rand(K, generator=torch.Generator().manual_seed(i)) * 2 - 1
            s = fold.tied(10**drawn, "amax")
            changed, became = applied(fold, s, state, linears)
            torch.testing.assert_close(became, s, rtol=1e-5, atol=0)
            assert not any(torch.equal(tensor, state[name]) for name, tensor in changed.items())
            state |= changed
            count += 1
    assert count >= 2 * len(streamed.skeleton)
    model.load_state_dict(state)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_scales_are_what_a_norms_stored_weight_makes_of_them() -> None:
    """In bfloat16 the norm's weight over s is rounded; the readers must take the scale that it really got."""
    g = torch.Generator().manual_seed(0)
    norm = torch.rand(64, generator=g).bfloat16() + 0.5
    norm[3] = 0
    w = torch.randn(8, 64, generator=g).bfloat16()
    weights = {"n.weight": norm, "a.weight": w}
    changed, s = applied(Fold("n", ("a",)), torch.rand(64, generator=g) + 0.3, weights, {"a": torch.nn.Linear(64, 8)})
    assert changed["n.weight"].dtype == torch.bfloat16 and changed["a.weight"].dtype == torch.float32
    product = changed["n.weight"].float() * changed["a.weight"]
    torch.testing.assert_close(product, norm.float() * w.float(), rtol=1e-6, atol=0)
    assert s[3] == 1 and weights["n.weight"] is norm


def test_grouped_query_attention_ties_scales() -> None:
    """Two query heads read each value head: their channels share a scale, and rows get each scale once."""
    fold = Fold("v", ("o",), rows=8, head=4, repeat=2)
    x = torch.arange(16.0)
    tied = fold.tied(x, "amax")
    assert torch.equal(tied[:4], tied[4:8]) and torch.equal(tied[:4], x[4:8])
    assert torch.equal(fold.tied(x, "mean")[:4], (x[:4] + x[4:8]) / 2)
    assert torch.equal(fold.of_rows(tied), torch.cat([x[4:8], x[12:]]))


def test_a_block_that_reads_the_norm_elsewhere_has_no_fold(tmp_path: Path) -> None:
    """A module that reads the norm's output behind the linear ones' backs is found out by the probe."""
    streamed, hidden = opened(make_checkpoint(tmp_path / "model", "llama", torch.float32), torch.float32)
    block = streamed.skeleton.blocks[0]
    honest = block.mlp.forward
    block.mlp.forward = lambda x: honest(x) + x  # type: ignore[method-assign, operator, union-attr]
    found = [leaf(f.producer) for f in find_folds(streamed.skeleton, 0, hidden)]
    assert found == ["input_layernorm", "v_proj", "up_proj"]
