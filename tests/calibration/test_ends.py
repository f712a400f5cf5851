"""The embedding and the head: what a change of them costs, and that rounding by it pays."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.calibration.embedding_statistics import HEAD_SHARE, observe_embedding, observe_head, summed_up
from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import load_tokenizer, sample
from bitwright.files.checkpoint import Checkpoint
from bitwright.methods.gptq import gptq
from bitwright.methods.search import search
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.codec import decode
from bitwright.numerics.scheme import Scheme
from conftest import make_checkpoint


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Skeleton, dict[str, Tensor]]:
    """A small model, its first block and what is outside the blocks loaded."""
    folder = make_checkpoint(tmp_path / "m", "llama", torch.float32)
    skeleton, checkpoint = Skeleton(read_config(folder), torch.float32), Checkpoint(folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    skeleton.load(weights)
    return skeleton, weights


def test_the_embedding_s_gram_is_that_of_the_first_block_s_derivative(
    loaded: tuple[Skeleton, dict[str, Tensor]],
) -> None:
    """Against the exact Jacobian, token by token: E[Jᵀ J] over all positions of a window."""
    skeleton, _ = loaded
    ids = torch.arange(6)[None] * 7
    hidden = skeleton.embed(ids)
    jacobian = torch.func.jacrev(lambda x: skeleton.run_with(0, x, {}))(hidden)  # [1, T, H, 1, T, H]
    J = jacobian[0, :, :, 0].flatten(0, 1)  # [T·H, T, H]
    exact = torch.einsum("oti,otj->ij", J, J) / ids.numel()
    found = observe_embedding(skeleton, [skeleton.embed(ids.repeat(2000, 1))]).gram
    assert found is not None
    assert torch.allclose(found, exact, atol=0.06 * float(exact.diagonal().mean()))


def test_the_head_s_inputs_are_those_behind_the_last_norm(loaded: tuple[Skeleton, dict[str, Tensor]]) -> None:
    skeleton, weights = loaded
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x = hidden.flatten(0, 1)
    x = x / (x.square().mean(-1, keepdim=True) + skeleton.config.rms_norm_eps).sqrt() * weights["model.norm.weight"]
    found = observe_head(skeleton, [hidden[:1], hidden[1:]])
    assert found.tokens == 10 and found.gram is not None
    assert torch.allclose(found.gram, x.T @ x / 10, atol=1e-5)


def test_a_matrix_that_is_both_weighs_both() -> None:
    head, embedding = torch.diag(torch.tensor([2.0, 0])), torch.diag(torch.tensor([0, 5.0]))
    found = summed_up(Inputs(("h",), 3, head), Inputs(("e",), 4, embedding)).gram
    assert found is not None and torch.allclose(found.diagonal(), torch.tensor([HEAD_SHARE, 1 - HEAD_SHARE]))


def test_rounding_an_embedding_by_it_changes_less_behind_the_block(shared: Path) -> None:
    """On a trained model: the first block's outputs move less than under scales searched for the rows alone."""
    folder = shared / "models/wiki-llama-7m"
    skeleton, checkpoint = Skeleton(read_config(folder), torch.float32), Checkpoint(folder)
    skeleton.load({n: checkpoint.read(n) for n in checkpoint.tensors if ".layers." not in n or ".layers.0." in n})
    text = str(shared / "text/wiki.txt")
    ids = sample(load_tokenizer(folder), text, samples=48, seqlen=128, vocabulary=4096, seed=1)
    w, scheme = checkpoint.read("model.embed_tokens.weight").float(), Scheme.parse("q2_k")
    inputs = observe_embedding(skeleton, [skeleton.embed(ids[:32])])
    ids = ids[32:].repeat(2, 1)
    lost = []
    for q in (gptq(w, inputs.gram, scheme).q, search(w, None, scheme).q):
        moved = skeleton.run(0, decode(q)[ids]) - skeleton.run(0, w[ids])
        lost.append(float(moved.square().mean()))
    assert lost[0] < 0.7 * lost[1]
