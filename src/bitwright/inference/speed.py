"""Measure how fast a model runs here: prefill, decoding, memory, and decoding's share of the memory bandwidth."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bitwright.errors import InputError
from bitwright.files.hub import local
from bitwright.inference.decoder import Decoder
from bitwright.inference.decoding import decoder_of
from bitwright.inference.dense import Dense
from bitwright.inference.loading import load
from bitwright.inference.qlinear import QLinear
from bitwright.kernels import native
from bitwright.models.families import positions_of
from bitwright.numerics.key_value_codes import key_value_codes
from bitwright.system.memory import forget_peak, peak_since

PROBE_BYTES = 1 << 29  # read to measure memory bandwidth: more than caches hold


@dataclass(frozen=True)
class Speed:
    """The JSON of `bitwright bench`. Rates in tokens a second, times in seconds; medians of several runs.

    bytes_per_token     bytes of weights that one token reads
    bandwidth           bytes a second that the same threads can read from memory
    bandwidth_fraction  share of it that decoding uses: 1 is the limit
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    load_seconds: float
    peak_rss_bytes: int
    bytes_per_token: int
    bandwidth: float
    bandwidth_fraction: float
    prompt: int
    decoded: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, keys as they are named."""
        return asdict(self)


def measure(
    path: Path,
    *,
    scheme: str | None = None,
    activations: int = 16,
    kv: str | None = None,
    prompt: int = 512,
    decode: int = 128,
    repeat: int = 3,
) -> Speed:
    """Run a checkpoint on random tokens: `prompt` tokens, then `decode` after them, `repeat` times.

    Raises what `load` does, and InputError where the model's context is too short.
    """
    codes = key_value_codes(kv)
    forget_peak()
    path = local(path)  # before the time is taken
    load_seconds, model = _timed(lambda: load(path, scheme=scheme, activations=activations))
    room = positions_of(model.config.get_text_config()) or prompt + decode
    if prompt + decode > room:
        raise InputError(
            f"{prompt} + {decode} tokens in a model made for {room}", remedy="--prompt and --decode below that"
        )
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
    decoder = decoder_of(model, prompt + decode, kv=codes)
    decoder.prefill(ids)  # warm up: what is set up at first use does not count
    rounds = [_round(decoder, ids, decode) for _ in range(repeat)]
    first, each = median(r[0] for r in rounds), median(r[1] for r in rounds)
    peak, bandwidth, size = peak_since(), read_bandwidth(), bytes_per_token(model)
    return Speed(
        prompt / first,
        1 / each,
        first,
        load_seconds,
        peak,
        size,
        bandwidth,
        size / each / bandwidth,
        prompt,
        decode,
        torch.get_num_threads(),
    )


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def _round(decoder: Decoder, ids: torch.Tensor, decode: int) -> tuple[float, float]:
    """Seconds for the prompt, and for a token after it."""
    first, logits = _timed(lambda: decoder.prefill(ids))
    steps = []
    for _ in range(decode):
        seconds, logits = _timed(partial(decoder.step, int(logits.argmax())))
        steps.append(seconds)
    return first, median(steps)


def bytes_per_token(model: torch.nn.Module) -> int:
    """Bytes of the weights that every token reads."""
    packed = sum(m.packed.nbytes for m in model.modules() if isinstance(m, QLinear))
    return packed + sum(m.weight.nbytes for m in model.modules() if isinstance(m, Dense))


def read_bandwidth() -> float:
    """Bytes a second that a matrix-vector product reads on torch's number of threads: the best of several runs."""
    rows = PROBE_BYTES // (4 * 4096)
    w, x, y = torch.ones(rows, 4096), torch.ones(1, 4096), torch.empty(1, rows)

    def read() -> None:
        if native is None:
            torch.mm(x, w.T, out=y)
        else:
            native.product_of_floats(w, x, y, torch.get_num_threads())

    return w.nbytes / min(_timed(read)[0] for _ in range(5))
