"""Several sequences in one decoder, keys and values in few bits, n-gram look-ahead: each against one sequence in float."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from bitwright import kernels, load
from bitwright.errors import InputError
from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.decoding import decoder_of, tokens
from bitwright.inference.module_decoder import ModuleDecoder
from bitwright.inference.native_decoder import NativeDecoder
from bitwright.inference.ngrams import NgramIndex
from bitwright.inference.sampling import Sampling
from bitwright.numerics.key_value_codes import KEY_VALUE_CODES, key_value_codes
from conftest import make_checkpoint

PROMPTS = [torch.arange(40) * 7 % 251, torch.tensor([9]), torch.arange(23) * 11 % 251]
DECODERS = [ModuleDecoder, *([NativeDecoder] if kernels.native else [])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("m")
    more: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 5}}
    return {
        name: load(make_checkpoint(folder / name, name, num_hidden_layers=2, **rest), scheme="int8-g32")
        for name, rest in more.items()
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor, wanted: int = 1) -> Tensor:
    """Logits by one forward of the modules, without a cache."""
    return model(ids[None]).logits[0, -wanted:]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_ragged_sequences_do_not_see_one_another(
    kind: Any, family: str, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of any length, then tokens of some of them, several at a time: each as if it were alone."""
    monkeypatch.setattr("bitwright.inference.native_decoder.TOKENS_AT_ONCE", 30)
    model = models[family]
    decoder: Decoder = kind(model, 60, slots=3)
    held = list(PROMPTS)
    for logits, ids in zip(decoder.read([Part(i, ids) for i, ids in enumerate(PROMPTS)]), held, strict=True):
        assert distance(logits, alone(model, ids)) < 2e-3
    for more in ({0: [5], 1: [6], 2: [7]}, {2: [1, 2, 3], 1: [4] * 20}, {1: [8], 0: [1, 2, 3, 4]}):
        parts = [Part(slot, torch.tensor(ids), len(ids)) for slot, ids in more.items()]
        for part, logits in zip(parts, decoder.read(parts), strict=True):
            held[part.slot] = torch.cat([held[part.slot], part.ids])
            assert distance(logits, alone(model, held[part.slot], part.wanted)) < 2e-3
    assert [decoder.length(slot) for slot in range(3)] == [len(ids) for ids in held]
    with pytest.raises(InputError, match="61 tokens in a context of 60"):
        decoder.read([Part(0, torch.zeros(61 - len(held[0]), dtype=torch.long))])


@pytest.mark.skipif(kernels.native is None, reason="the extension was not built")
@pytest.mark.parametrize("kv", [None, "q8", "q4"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_a_sequence_says_does_not_depend_on_the_others(
    family: str, kv: str | None, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: prompts in pieces of another size, tokens beside those of others, one by one or several at a time."""
    model, codes, more = models[family], key_value_codes(kv), [torch.tensor(ids) for ids in ([5], [6, 7, 8], [1])]
    monkeypatch.setattr("bitwright.inference.native_decoder.TOKENS_AT_ONCE", 30)
    together = NativeDecoder(model, 60, slots=3, kv=codes)
    first = together.read([Part(slot, ids) for slot, ids in enumerate(PROMPTS)])
    second = together.read([Part(slot, ids, len(ids)) for slot, ids in enumerate(more)])
    monkeypatch.undo()
    for slot, prompt in enumerate(PROMPTS):
        alone = NativeDecoder(model, 60, kv=codes)
        assert torch.equal(alone.prefill(prompt), first[slot][0])
        assert torch.equal(torch.stack([alone.step(int(token)) for token in more[slot]]), second[slot])


@pytest.mark.parametrize("kind", DECODERS)
def test_a_sequence_goes_back_and_is_copied(kind: Any, models: dict[str, PreTrainedModel]) -> None:
    decoder: Decoder = kind(models["llama"], 60, slots=2)
    decoder.read([Part(0, PROMPTS[0])])
    assert decoder.copy(0, 1, 30) == 30 and decoder.keep(0, 35) == 35 and decoder.keep(0, 50) == 35
    for slot, kept in ((0, 35), (1, 30)):
        ids = torch.cat([PROMPTS[0][:kept], torch.tensor([3, 4])])
        (logits,) = decoder.read([Part(slot, ids[kept:])])
        assert distance(logits, alone(models["llama"], ids)) < 2e-3


@pytest.mark.parametrize("kind", DECODERS)
def test_a_window_goes_back_over_what_was_read_last(kind: Any, models: dict[str, PreTrainedModel]) -> None:
    """What look-ahead needs; and beyond that a window in a module's cache begins anew rather than wrong."""
    decoder: Decoder = kind(models["mistral"], 60)
    decoder.read([Part(0, PROMPTS[0])])
    decoder.read([Part(0, torch.tensor([1, 2, 3]), 3)])
    assert decoder.keep(0, 41) == 41
    ids = torch.cat([PROMPTS[0], torch.tensor([1, 9])])
    (logits,) = decoder.read([Part(0, ids[41:])])
    assert distance(logits, alone(models["mistral"], ids)) < 2e-3
    assert decoder.keep(0, 20) == (20 if kind is NativeDecoder else 0)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(("kv", "least", "most"), [("q8", 1e-4, 0.02), ("q4", 5e-3, 0.2)])
def test_keys_and_values_in_few_bits(
    kind: Any, kv: str, least: float, most: float, models: dict[str, PreTrainedModel]
) -> None:
    """Close to float, by the same numbers in both decoders, and in that much less memory."""
    model, codes = models["llama"], KEY_VALUE_CODES[kv]
    exact, coded, other = (
        ModuleDecoder(model, 60), kind(model, 60, kv=codes), ModuleDecoder(model, 60, kv=codes),
    )  # fmt: skip
    for decoder in (exact, coded, other):
        decoder.prefill(PROMPTS[0])
    for token in (7, 200, 3):
        a, b, c = exact.step(token), coded.step(token), other.step(token)
        assert least < distance(b, a) < most and distance(b, c) < max(3e-3, distance(b, a) / 2)
    if kind is NativeDecoder:
        held = NativeDecoder(model, 60).store.rows.nbytes
        assert coded.store.rows.nbytes / held == codes.width(16) / 32


def test_codes_of_keys_and_values() -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 40  # a channel far larger than the others
    errors = {}
    for name, codes in KEY_VALUE_CODES.items():
        rows = codes.encode(x)
        assert rows.shape == (3, 5, codes.width(64)) and rows.dtype == torch.uint8
        blocks = x.unflatten(-1, (-1, codes.block(64)))
        spread = blocks.abs().amax(-1) / 127 if name == "q8" else (blocks.amax(-1) - blocks.amin(-1)) / 15
        off = (codes.decode(rows, 64) - x).unflatten(-1, blocks.shape[-2:]).abs().amax(-1)
        assert (off <= 0.51 * spread + 1e-2 * spread.max()).all()
        errors[name] = distance(codes.rounded(x), x), distance(codes.rounded_keys(x), x)
    assert errors["q8"][0] < 0.02 and errors["q8"][0] == errors["q8"][1]
    assert errors["q4"][1] < errors["q4"][0], "rotation does not help"
    assert (KEY_VALUE_CODES["q4"].rounded(torch.zeros(2, 48)) == 0).all()
    assert 8 * KEY_VALUE_CODES["q8"].width(128) / 128 <= 8.5 and 8 * KEY_VALUE_CODES["q4"].width(128) / 128 <= 4.5
    with pytest.raises(InputError, match="q3"):
        key_value_codes("q3")


class Counting(ModuleDecoder):
    """How many times it read."""

    reads = 0

    def read(self, parts: Any) -> list[Tensor]:
        self.reads += 1
        return super().read(parts)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_look_ahead_changes_no_token(
    temperature: float, models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the stream of random numbers, so not the distribution either."""
    monkeypatch.setattr("bitwright.inference.decoding.perf_counter", itertools.count().__next__)  # all take alike
    prompt = torch.tensor([10, 20, 30, 40] * 5)
    said, reads = [], []
    for lookahead in (0, 6):
        decoder = Counting(models["llama"], 64)
        sampling = Sampling(temperature, 0.9, seed=3)
        said.append(list(tokens(decoder, prompt, most=40, stop=frozenset(), sampling=sampling, lookahead=lookahead)))
        reads.append(decoder.reads)
        assert len(said[-1]) == 40
    assert said[0] == said[1]
    assert reads[0] == 40 and (temperature or reads[1] < 25), reads


def test_proposals_come_from_the_last_place_that_is_alike() -> None:
    seen = NgramIndex(4)
    seen.extend([1, 2, 3, 4, 1, 2, 3, 5, 9, 1, 2, 3])
    assert seen.propose(8) == [5, 9]  # two at first
    seen.judged(0, 0, 1.0)
    seen.judged(2, 2, 2.9)
    assert seen.propose(8) == [5, 9, 1, 2] and seen.propose(1) == [5] and seen.propose(0) == []
    seen.judged(4, 4, 5.1)  # it would have taken 5 without
    assert [len(seen.propose(8)) for _ in range(17)] == [0] * 16 + [2]
    seen.judged(2, 0, 1.0)
    assert [len(seen.propose(8)) for _ in range(65)] == [0] * 64 + [2]
    seen.extend([200])
    assert seen.propose(8) == [] and NgramIndex(0).propose(8) == []


def test_a_stop_within_a_proposal_ends_there(models: dict[str, PreTrainedModel]) -> None:
    prompt, model = torch.tensor([10, 20, 30, 40] * 5), models["llama"]
    whole = list(tokens(ModuleDecoder(model, 64), prompt, most=30, stop=frozenset(), sampling=Sampling()))
    stop = frozenset({whole[20]})
    ended = list(tokens(ModuleDecoder(model, 64), prompt, most=30, stop=stop, sampling=Sampling(), lookahead=6))
    assert ended == whole[: whole.index(whole[20])]


@pytest.mark.parametrize("bad", ["q5", "8"])
def test_an_unknown_format_of_keys_is_refused_before_loading(bad: str, tmp_path: Path) -> None:
    from bitwright.inference.generation import Generator

    with pytest.raises(InputError, match="keys and values"):
        Generator.open(tmp_path / "nothing", kv=bad)


@pytest.mark.parametrize(
    "family",
    ["mamba", "mamba2", "falcon_mamba", "bamba", "lfm2", "zamba2", "qwen3_next", "recurrent_gemma", "openai-gpt", "rwkv",
     "minimax", "xlstm", "gpt2", "gemma3_text"],
)  # fmt: skip
@torch.no_grad()
def test_whatever_cache_a_family_has_a_text_is_read_on_as_if_it_were_whole(family: str) -> None:
    """Mamba's cache has another name, GPT-1 has none, Bamba begins at position 0, some go on by one token alone."""
    torch.manual_seed(0)
    model, ids = tiny_model(family).float().eval(), torch.arange(30) * 7 % 90 + 3
    whole, decoder, at = model(ids[None], use_cache=False).logits[0], decoder_of(model, 30, slots=2), 0
    for count in (1, 6, 1, 5, 1):
        decoder.read([Part(1, ids[:3])])  # another sequence, forgotten each time
        (logits,) = decoder.read([Part(0, ids[at : at + count], count)])
        assert distance(logits, whole[at : at + count]) < 1e-4
        at += count
        decoder.keep(1, 0)


def test_keys_and_values_of_a_family_that_keeps_none_cannot_be_rounded() -> None:
    with pytest.raises(InputError, match="keep no keys and values"):
        decoder_of(tiny_model("openai-gpt"), 30, kv=key_value_codes("q8"))
