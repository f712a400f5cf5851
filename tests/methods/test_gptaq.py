"""GPTAQ: its target is the least-squares one, and a network of rounded layers comes nearer to the float one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitwright.api import evaluate, quantize
from bitwright.calibration.block_run import BlockRun
from bitwright.calibration.input_groups import Group, groups_of
from bitwright.calibration.input_statistics import Gathering
from bitwright.calibration.observe import FloatStream, _towards, observe
from bitwright.calibration.statistics import CHUNK, Cross
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.errors import RecipeError
from bitwright.methods import gptaq, gptq
from bitwright.methods.gptaq import corrected
from bitwright.models.streamed import StreamedModel
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import loss
from bitwright.numerics.scheme import Scheme
from bitwright.plan.rule import Rule
from conftest import make_checkpoint


def problem(T: int = 400, N: int = 16, K: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """w, the float model's inputs and the quantized one's, which differ by more than noise: some of it is a mixture."""
    g = torch.Generator().manual_seed(0)
    original = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.2 * torch.randn(K, K, generator=g))
    given = original @ (torch.eye(K) + 0.05 * torch.randn(K, K, generator=g)) + 0.1 * torch.randn(T, K, generator=g)
    return torch.randn(N, K, generator=g) * 0.05, original, given


def statistics(original: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    return given.T @ given / len(given), (original - given).T @ given / len(given)


def test_the_target_is_the_least_squares_one() -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    found = corrected(w, gram, drift, 1e-6)
    expected = torch.linalg.lstsq(given.double(), original.double() @ w.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    ridge = 0.3 * gram.diagonal().mean() * torch.eye(64)
    by_hand = w.double() + w.double() @ drift.double() @ torch.linalg.inv((gram + ridge).double())
    torch.testing.assert_close(corrected(w, gram, drift, 0.3).double(), by_hand, rtol=1e-4, atol=1e-6)


def test_much_damping_and_equal_inputs_leave_the_weight() -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    torch.testing.assert_close(corrected(w, gram, drift, 1e6), w, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(corrected(w, gram, torch.zeros(64, 64), 0.01), w)


@pytest.mark.parametrize("text", ["int4-g32", "int2-g32-asym", "nf4-g64", "q4_k"])
def test_outputs_come_nearer_to_the_float_models(text: str) -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    scheme, kept = Scheme.parse(text), (w.clone(), gram.clone(), drift.clone())
    plain, aimed = gptq(w, gram, scheme).q, gptaq(w, gram, scheme, drift=drift).q
    errors = [float((given @ decode(q).T - original @ w.T).square().mean()) for q in (plain, aimed)]
    assert errors[1] < 0.9 * errors[0]
    assert loss(w, decode(aimed), gram) > loss(w, decode(plain), gram)  # which is what it is traded for
    assert torch.equal(gptaq(w, gram, scheme).q.codes, plain.codes)
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, gram, drift), strict=True))


def test_a_gram_that_cannot_be_factored_leaves_the_weight() -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    bad = gram - 100 * torch.eye(64)
    assert torch.equal(corrected(w, bad, drift, 0.01), w)


def test_refusals() -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    with pytest.raises(RecipeError, match="must be above 0"):
        gptaq(w, gram, Scheme.parse("int4-g32"), drift=drift, correction_damping=0.0)
    with pytest.raises(RecipeError, match="needs calibration"):
        gptaq(w, None, Scheme.parse("int4-g32"))
    with pytest.raises(RecipeError, match="no option 'drift'"):
        Rule("*", Scheme.parse("int4-g32"), "gptaq", {"drift": "x"})


def test_a_residual_stream_that_has_drifted_is_brought_back() -> None:
    w, original, given = problem()
    gram, drift = statistics(original, given)
    g = torch.Generator().manual_seed(2)
    ahead = given @ torch.randn(64, 16, generator=g) * 0.01 + 0.1 * torch.randn(400, 16, generator=g)
    found = corrected(w, gram, drift, 1e-6, ahead.T @ given / 400)
    expected = torch.linalg.lstsq(given.double(), original.double() @ w.double().T + ahead.double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cross_product_is_that_of_its_parts(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, CHUNK, width, generator=g).to(dtype) for width in (12, 20))
    whole, first, second = (Cross(12, 20) for _ in range(3))
    whole.update(a, b)
    first.update(a[0], b[0])
    second.update(a[1], b[1])
    first.merge(second)
    expected = a.double().reshape(-1, 12).T @ b.double().reshape(-1, 20) / (2 * CHUNK)
    for found in (whole.value(), first.value()):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_bfloat16_leaves_the_digits_of_a_small_drift() -> None:
    """A massive channel (arXiv:2402.17762) and a drift of one step in the last place, which X₀ᵀX − XᵀX would have lost."""
    g = torch.Generator().manual_seed(1)
    given = torch.randn(CHUNK, 20, generator=g)
    given[:, 0] = 1000
    given = given.bfloat16()
    original = (given.float() * torch.where(torch.rand(CHUNK, 20, generator=g) < 0.5, 1 + 2**-7, 1.0)).bfloat16()
    gathering = Gathering.of(given, detailed=False, expected=CHUNK)
    gathering.update(given, original)
    expected = (original.double() - given.double()).T @ given.double() / CHUNK
    found = gathering.value().drift
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def test_tokens_count_as_they_are_told_to() -> None:
    _, original, given = problem()
    counting = torch.rand(400, generator=torch.Generator().manual_seed(3))
    ahead = (original - given)[:, :16]
    gathering = Gathering.of(given, detailed=False, expected=400)
    gathering.update(given, original, ahead, counting)
    found, weighted = gathering.value(), given * counting[:, None]
    for product, left in ((found.gram, given), (found.drift, original - given), (found.residual, ahead)):
        assert product is not None
        torch.testing.assert_close(product, left.T @ weighted / 400, rtol=1e-4, atol=1e-5)


def at_first_block(model: Path, text: str) -> tuple[StreamedModel, list[Tensor]]:
    """A model with its first block loaded, and what that is given for 8 windows, in two batches."""
    streamed = StreamedModel(model)
    ids = windows(load_tokenizer(model), text, seqlen=32, vocabulary=streamed.skeleton.config.vocab_size)[:8]
    streamed.load(streamed.skeleton.outer_names())
    batches = [streamed.skeleton.embed(part) for part in ids.split(4)]
    streamed.load(streamed.skeleton.state_names(0))
    return streamed, batches


def test_observing_both_streams(llama: Path, text: str) -> None:
    """With the same activations in both streams nothing has drifted; with others, that is what the statistics say."""
    streamed, batches = at_first_block(llama, text)
    run = BlockRun(streamed.skeleton, 0)
    groups = groups_of(run, batches[0], list(streamed.skeleton.linears(0)))
    assert [len(group.names) for group in groups] == [3, 1, 2, 1]
    attention, mlp = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    assert [group.behind for group in groups] == [None, (), None, (attention,)]
    assert groups[1].names == (attention,) and groups[3].names == (mlp,)
    for s in observe(run, batches, groups, FloatStream(run, list(batches), groups)):
        assert s.drift is not None and s.gram is not None and s.tokens == 8 * 32
        assert not s.drift.any() and (s.residual is None or not s.residual.any())
    apart = [1.1 * batch for batch in batches]
    seen = observe(run, batches, groups, FloatStream(run, list(apart), groups))
    assert seen[0].drift is not None and seen[-1].drift is not None
    assert float(seen[0].drift.abs().max()) < 1e-3  # behind a norm
    assert float(seen[-1].drift.abs().max()) > 1e-5
    recorded = run.record(batches[0], [attention], [])
    x, ahead = (t.flatten(0, 1) for t in (recorded.inputs[attention], 0.1 * batches[0]))
    one = observe(run, batches[:1], groups[1:2], FloatStream(run, apart[:1], groups))[0]
    torch.testing.assert_close(one.residual, ahead.T @ x / len(x), rtol=1e-3, atol=1e-6)
    assert all(s.drift is None and s.residual is None for s in observe(run, batches, groups))


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_float_stream_is_the_same_kept_or_computed_anew(
    kept: int, llama: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.calibration.observe.KEPT_BYTES", kept)
    streamed, batches = at_first_block(llama, text)
    run = BlockRun(streamed.skeleton, 0)
    groups = groups_of(run, batches[0], list(streamed.skeleton.linears(0)))
    stream = FloatStream(run, list(batches), groups)
    for b, batch in enumerate(batches):
        for group in groups:
            name = group.names[0]
            assert torch.equal(stream.of(b, group).inputs[name], run.record(batch, [name], []).inputs[name])
    stream.move_on()
    assert all(torch.equal(run(before), after) for before, after in zip(batches, stream.batches, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "gemma", "gemma2", "gemma3_text"])
def test_what_is_added_to_the_residual_stream_is_found(family: str, tmp_path: Path) -> None:
    """Also side by side (GPT-NeoX, Phi), and behind norms of their own (Gemma 2 and 3)."""
    streamed = StreamedModel(make_checkpoint(tmp_path / "model", family, torch.float32))
    streamed.load(streamed.skeleton.outer_names())
    hidden = streamed.skeleton.embed(torch.arange(32)[None])
    streamed.load(streamed.skeleton.state_names(0))
    groups: list[Group] = groups_of(BlockRun(streamed.skeleton, 0), hidden, list(streamed.skeleton.linears(0)))
    added = [group for group in groups if group.behind is not None]
    assert [len(group.behind or ()) for group in added] == [0, 1]
    assert all(bool(group.norm) == (family in ("gemma2", "gemma3_text")) for group in added)


def test_behind_a_norm_the_stream_is_brought_back_too(text: str, tmp_path: Path) -> None:
    """What o_proj is to give, through the norm behind it, makes the quantized model's stream the float one's."""
    streamed = StreamedModel(make_checkpoint(tmp_path / "model", "gemma2", torch.float32))
    ids = windows(load_tokenizer(streamed.folder), text, seqlen=32, vocabulary=257)[:4]
    streamed.load(streamed.skeleton.outer_names())
    given = streamed.skeleton.embed(ids)
    streamed.load(streamed.skeleton.state_names(0))
    run = BlockRun(streamed.skeleton, 0)
    group = groups_of(run, given, list(streamed.skeleton.linears(0)))[1]
    name, original = group.names[0], given + 0.05 * torch.randn_like(given)
    mine, theirs = (run.record(h, [name], [group.norm]) for h in (given, original))
    ahead, _ = _towards(streamed.skeleton, group, mine.inputs[name], given, (original, theirs.inputs[name]))
    assert ahead is not None
    meant = original + theirs.outputs[group.norm]
    module, norm = (streamed.skeleton.model.get_submodule(n) for n in (name, group.norm))
    wanted = module(theirs.inputs[name]) + ahead
    slope = norm(module(mine.inputs[name])) / module(mine.inputs[name])
    torch.testing.assert_close(given + wanted * slope, meant, rtol=1e-3, atol=1e-3)


def test_a_model_comes_nearer_to_the_original(llama: Path, text: str, tmp_path: Path) -> None:
    kl = []
    for method in ("gptq", "gptaq"):
        done = quantize(
            llama, tmp_path / method, scheme="int2-g32-asym", method=method, calib=text, samples=64, seqlen=32
        )
        assert {e.method for e in done.ledger if e.action == "quantized"} == {method}
        kl.append(evaluate(tmp_path / method, reference=llama, text=text, seqlen=32, tokens=1024).kl_mean)
    assert kl[0] is not None and kl[1] is not None and kl[1] < kl[0]
