"""Generate tokens: the fastest decoder of a model, and the loop of choosing a token and reading it.

For quantized Llama, Mistral, Qwen2 and Qwen3 the extension runs whole blocks (native_decoder.py); for all others, and without
the extension, the modules run with transformers' cache (module_decoder.py), or without one (whole_decoder.py). All give the
same logits.
"""

from collections.abc import Iterator
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.errors import CheckpointError, InputError
from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.module_decoder import ModuleDecoder, takes_cache
from bitwright.inference.native_decoder import NativeDecoder, runs_natively
from bitwright.inference.ngrams import NgramIndex
from bitwright.inference.sampling import Sampling
from bitwright.inference.whole_decoder import WholeDecoder
from bitwright.models.kv_cache import check_unrounded
from bitwright.numerics.key_value_codes import KeyValueCodes


def decoder_of(model: PreTrainedModel, context: int, *, slots: int = 1, kv: KeyValueCodes | None = None) -> Decoder:
    """The fastest decoder for this model. context: tokens of a sequence, prompt included. CheckpointError for an encoder."""
    if not model.can_generate():
        message = f"models of type {model.config.model_type!r} predict no next token"
        raise CheckpointError(message, remedy="`bitwright.load` gives their hidden states")
    if kv is not None:
        check_unrounded(getattr(model.config, "quantization_config", None), model.config.model_type)
    by_modules = ModuleDecoder if takes_cache(model) else WholeDecoder
    kind = NativeDecoder if runs_natively(model) else by_modules
    return kind(model, context, slots=slots, kv=kv)


def tokens(
    decoder: Decoder, prompt: Tensor, *, most: int, stop: frozenset[int], sampling: Sampling, lookahead: int = 0
) -> Iterator[int]:
    """Generate up to `most` tokens behind a prompt [T], without the stop token. InputError for an empty prompt.

    lookahead: tokens proposed at a time from what the text repeats (see ngrams.py); 0: none.
    """
    if not len(prompt):
        raise InputError("an empty prompt", remedy="give at least one token")
    generator = torch.Generator().manual_seed(sampling.seed)
    seen = NgramIndex(lookahead if decoder.goes_back else 0)
    seen.extend(prompt.tolist())
    logits, proposed, seconds = decoder.prefill(prompt)[None], list[int](), 0.0
    while True:
        chosen: list[int] = []
        for row in logits:  # of the last token, then of each proposed one, as long as it is what is chosen
            chosen.append(sampling.pick(row, generator))
            if chosen[-1] in stop:
                return
            yield chosen[-1]
            most -= 1
            if most < 1:
                return
            if chosen != proposed[: len(chosen)]:
                break
        if seconds:
            seen.judged(len(proposed), len(chosen) - 1, seconds)
        if proposed:
            decoder.keep(0, decoder.length(0) - len(proposed) + len(chosen) - 1)
        seen.extend(chosen)
        proposed = seen.propose(min(most - 1, decoder.context - decoder.length(0) - 1))
        ids = torch.tensor([chosen[-1], *proposed])
        begun = perf_counter()
        logits = decoder.read([Part(0, ids, len(ids))])[0]
        seconds = perf_counter() - begun
