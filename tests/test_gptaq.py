"""GPTAQ: its target is the least-squares one, and a network of rounded layers comes nearer to the float one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.api import evaluate, quantize
from bitwright.block import observe
from bitwright.calibration import load_tokenizer, windows
from bitwright.codec import decode
from bitwright.errors import RecipeError
from bitwright.loss import loss
from bitwright.methods import gptaq, gptq
from bitwright.methods.gptaq import corrected
from bitwright.recipe import Rule
from bitwright.scheme import Scheme
from bitwright.statistics import CHUNK, Cross
from bitwright.walk import Walk


def problem(T: int = 400, N: int = 16, K: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """w, the float model's inputs and the quantized one's, which differ by more than noise: some of it is a mixture."""
    g = torch.Generator().manual_seed(0)
    original = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.2 * torch.randn(K, K, generator=g))
    given = original @ (torch.eye(K) + 0.05 * torch.randn(K, K, generator=g)) + 0.1 * torch.randn(T, K, generator=g)
    return torch.randn(N, K, generator=g) * 0.05, original, given


def statistics(original: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    return given.T @ given / len(given), original.T @ given / len(given)


def test_the_target_is_the_least_squares_one() -> None:
    w, original, given = problem()
    gram, cross = statistics(original, given)
    found = corrected(w, gram, cross, 1e-6)
    expected = torch.linalg.lstsq(given.double(), original.double() @ w.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    ridge = 0.3 * gram.diagonal().mean() * torch.eye(64)
    by_hand = w.double() + w.double() @ (cross - gram).double() @ torch.linalg.inv((gram + ridge).double())
    torch.testing.assert_close(corrected(w, gram, cross, 0.3).double(), by_hand, rtol=1e-4, atol=1e-6)


def test_much_damping_and_equal_inputs_leave_the_weight() -> None:
    w, original, given = problem()
    gram, cross = statistics(original, given)
    torch.testing.assert_close(corrected(w, gram, cross, 1e6), w, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(corrected(w, gram, gram, 0.01), w)


@pytest.mark.parametrize("text", ["int4-g32", "int2-g32-asym", "nf4-g64", "q4_k"])
def test_outputs_come_nearer_to_the_float_models(text: str) -> None:
    w, original, given = problem()
    gram, cross = statistics(original, given)
    scheme, kept = Scheme.parse(text), (w.clone(), gram.clone(), cross.clone())
    plain, aimed = gptq(w, gram, scheme).q, gptaq(w, gram, scheme, cross=cross).q
    errors = [float((given @ decode(q).T - original @ w.T).square().mean()) for q in (plain, aimed)]
    assert errors[1] < 0.9 * errors[0]
    assert loss(w, decode(aimed), gram) > loss(w, decode(plain), gram)  # which is what it is traded for
    assert torch.equal(gptaq(w, gram, scheme).q.codes, plain.codes)
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, gram, cross), strict=True))


def test_a_gram_that_cannot_be_factored_leaves_the_weight() -> None:
    w, original, given = problem()
    gram, cross = statistics(original, given)
    bad = gram - 100 * torch.eye(64)
    assert torch.equal(corrected(w, bad, cross, 0.01), w)


def test_refusals() -> None:
    w, original, given = problem()
    gram, cross = statistics(original, given)
    with pytest.raises(RecipeError, match="must be above 0"):
        gptaq(w, gram, Scheme.parse("int4-g32"), cross=cross, correction_damping=0.0)
    with pytest.raises(RecipeError, match="needs calibration"):
        gptaq(w, None, Scheme.parse("int4-g32"))
    with pytest.raises(RecipeError, match="no option 'cross'"):
        Rule("*", Scheme.parse("int4-g32"), "gptaq", {"cross": "x"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cross_stream_is_the_whole(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, CHUNK, 20, generator=g).to(dtype) for _ in range(2))
    whole, first, second = Cross(20), Cross(20), Cross(20)
    whole.update(a, b)
    first.update(a[0], b[0])
    second.update(a[1], b[1])
    first.merge(second)
    expected = a.double().reshape(-1, 20).T @ b.double().reshape(-1, 20) / (2 * CHUNK)
    for found in (whole.value(), first.value()):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_observing_both_streams(llama: Path, text: str) -> None:
    """With the same activations in both streams, the product of both is the Gram; the float stream moves on."""
    walk = Walk(llama)
    ids = windows(load_tokenizer(llama), text, seqlen=32, vocabulary=walk.skeleton.config.vocab_size)[:8]
    walk.load(walk.skeleton.outer_names())
    batches = [walk.skeleton.embed(part) for part in ids.split(4)]
    walk.load(walk.skeleton.state_names(0))
    original = list(batches)
    seen = observe(walk.skeleton, 0, batches, list(walk.skeleton.linears(0)), original)
    assert [len(s.names) for s in seen] == [3, 1, 2, 1]
    for s in seen:
        assert s.cross is not None and s.gram is not None and s.tokens == 8 * 32
        torch.testing.assert_close(s.cross, s.gram, rtol=1e-4, atol=1e-6)
    for before, after in zip(batches, original, strict=True):
        torch.testing.assert_close(after, walk.skeleton.run(0, before))
    assert all(s.cross is None for s in observe(walk.skeleton, 0, batches, list(walk.skeleton.linears(0))))


def test_a_model_comes_nearer_to_the_original(llama: Path, text: str, tmp_path: Path) -> None:
    kl = []
    for method in ("gptq", "gptaq"):
        done = quantize(
            llama, tmp_path / method, scheme="int2-g32-asym", method=method, calib=text, samples=64, seqlen=32
        )
        assert {e.method for e in done.ledger if e.action == "quantized"} == {method}
        kl.append(evaluate(tmp_path / method, reference=llama, text=text, seqlen=32, tokens=1024).kl_mean)
    assert kl[0] is not None and kl[1] is not None and kl[1] < kl[0]
