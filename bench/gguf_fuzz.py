"""Fuzz of GGUF metadata: files whose tokenizer tables and architecture keys are damaged must be read or refused, nothing else.

    python -m bench.gguf_fuzz [--inputs 100000] [--seed 0]

Each input is a small file of one architecture and one family of tokenizers with one to three changes: keys deleted, renamed,
of another type, absurd numbers, tables cut, grown, shuffled, with odd texts, and bytes of the header overwritten. It is read as
`inspect`, `generate` and `quantize` read it: header, keys, config, tokenizer (which then encodes a text), now and then the
whole model. Allowed is an error of `bitwright.errors`; anything else, or memory beyond `--memory`, is a failure. One that takes
20 seconds of processor time is read once more with five minutes: if it is done then, it is counted as slow (the machine may
be loaded), else it is a failure too. A failure is printed with the number that makes the same input again, where it came
from, and the keys that were changed.
"""

import argparse
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bench.gguf_families import small_config
from bitwright.errors import BitwrightError, FormatError
from bitwright.evaluation.gguf_inspection import described
from bitwright.gguf.architectures import check_is_model
from bitwright.gguf.config_keys import config_of, keys_of
from bitwright.gguf.pretokenizers import PRE_TOKENIZERS
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.special_tokens import ends_of
from bitwright.gguf.tensor_names import Names
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.experts import one_by_one
from bitwright.models.families import model_of
from bitwright.models.gguf_source import GgufWeightSource

KINDS = (
    "llama", "gemma2", "qwen3_moe", "gpt2", "phi3", "cohere2", "olmo", "qwen3_next", "granitemoehybrid", "mamba2",
    "nemotron_h", "jamba", "llama4_text", "mamba", "qwen3_5_text", "gemma4_text", "apertus", "nomic_bert", "gemma-embedding",
)  # fmt: skip
VOCABULARY = 300
SECONDS, PATIENCE = 20, 300  # of processor time, and when an input is read once more
SLOW = "slow"
WHOLE = 40  # every so many inputs the model's weights are opened too
TEXT = "Hello  wörld 1234\n\tdon't <s> 日本 🙂 def f(x): return x"
ODD = (
    "", " ", "\n", "\x00", "▁", "##", "Ġ", "<0x0A>", "<0xGG>", "<s>", "a b", "a b c", "é", "\udcff", "x" * 5000, "🙂", "{{",
    "{% if %}",    "Ã", "true", "-1", "[UNK]", "<|im_end|>",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 63, 255, 299, 300, 301, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 0.0, -1.5, 1e-45,
    1e38, float("nan"), float("inf"),
)  # fmt: skip
LAYOUTS = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q"}
STRING, ARRAY = 8, 9


class Base(NamedTuple):
    """An undamaged file: keys, and name and shape of each tensor."""

    keys: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


class TooLongError(BaseException):
    """An input that is not done with in time."""


def families() -> list[dict[str, Any]]:
    """Keys of a small tokenizer of each family."""
    letters = list(bytes_to_unicode().values())
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", *["▁a", "▁b", "e", "t", "he", "▁the", "in", "er", "▁t", "on", "re"], *"abcdefghijklmnopqrs"][
        : VOCABULARY - len(pieces)
    ]
    sentences = [*pieces, *words, *(f"w{i}" for i in range(VOCABULARY - len(pieces) - len(words)))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)]
    merges = ["h e", "Ġ t", "i n", "he l", "l o", "Ġt he"]
    joined = [*letters, *(pair.replace(" ", "") for pair in merges), "<s>", "<|im_end|>"]
    byte_level = [*joined, *(f"tok{i}" for i in range(VOCABULARY - len(joined)))]
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    bpe = {"model": "gpt2", "pre": "qwen2", "tokens": byte_level, "token_type": [1] * VOCABULARY, "merges": merges}
    bert = [*["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], *(f"▁{c}" for c in "abcdefghij"), *"abcdefghij"]
    scores = [-float(i) for i in range(VOCABULARY)]
    return [
        bpe | {"bos_token_id": 262, "eos_token_id": 263, "add_space_prefix": False},
        {"model": "gemma4", "pre": "gemma4", "tokens": sentences, "token_type": kinds, "merges": ["h e", "▁ t"], **special},
        {"model": "llama", "pre": "default", "tokens": sentences, "token_type": kinds, "scores": scores, **special},
        {"model": "t5", "tokens": sentences, "token_type": kinds, "scores": scores, "remove_extra_whitespaces": True,
         "precompiled_charsmap": [0, 0, 0, 0], **special},
        {"model": "bert", "tokens": [*bert, *(f"w{i}" for i in range(VOCABULARY - len(bert)))],
         "token_type": [3] * 5 + [1] * (VOCABULARY - 5), "cls_token_id": 2, "seperator_token_id": 3, "mask_token_id": 4,
         "unknown_token_id": 1, "padding_token_id": 0},
    ]  # fmt: skip


def bases() -> list[Base]:
    """An undamaged file of each architecture, with the tokenizers in turn."""
    found, tokenizers = [], families()
    for number, kind in enumerate(KINDS):
        config = small_config(kind, vocab_size=VOCABULARY, num_hidden_layers=4, n_layer=2)
        names = Names(config)
        with torch.device("meta"):
            model = model_of(config)
            one_by_one(model)
        tensors = {}
        for name, t in model.state_dict().items():
            with suppress(FormatError):  # llama.cpp has no tensor for tied parameters
                tensors |= {
                    place.name: place.shape for place in names.places(name, names.own_shape(name, tuple(t.shape)))
                }
        for own in (tokenizers[number % len(tokenizers)], tokenizers[0]):
            keys = {f"tokenizer.ggml.{name}": value for name, value in own.items()}
            template = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.chat_template.tool_use": "{{ tools }}"}
            found.append(Base({**keys_of(config), "general.name": kind, **keys, **template}, tensors))
    return found


def damaged(keys: dict[str, Any], random: Random) -> dict[str, Any]:
    """The keys with one to three changes."""
    keys = dict(keys)
    for _ in range(random.randint(1, 3)):
        name = random.choice([name for name in keys if name != "general.alignment"])
        change = random.random()
        if change < 0.15:
            del keys[name]
        elif change < 0.2:
            keys[name + random.choice(ODD[:6])] = keys.pop(name)
        elif change < 0.35:
            keys[name] = _anything(random)
        elif isinstance(keys[name], list):
            keys[name] = _other_table(list(keys[name]), random)
        elif isinstance(keys[name], str):
            keys[name] = random.choice(
                [*ODD, *PRE_TOKENIZERS, "gpt2", "llama", "bert", "t5", "gemma4", "rwkv", "qwen3", "none"]
            )
        else:
            keys[name] = random.choice(NUMBERS)
    return keys


def _anything(random: Random) -> Any:
    few = random.randint(0, 5)
    kinds = [random.choice(ODD), random.choice(NUMBERS), True, [], [random.choice(ODD) for _ in range(few)]]
    return random.choice([*kinds, [random.choice(NUMBERS) for _ in range(few)], [[1, 2], [3]], [["a"], []]])


def _other_table(table: list[Any], random: Random) -> list[Any]:
    """A table cut, grown, shuffled, or with some entries changed."""
    at, change = random.randrange(len(table) + 1), random.randrange(7)
    entries = NUMBERS if table and isinstance(table[0], int | float) and not isinstance(table[0], bool) else ODD
    if change == 0:
        return table[:at]
    if change == 1:
        return [*table, *(random.choice(entries) for _ in range(random.choice((1, 10, 1000))))]
    if change == 2:
        random.shuffle(table)
        return table
    if change == 3:
        return [table[at - 1]] * len(table) if table else table
    if change == 4:
        return table[at:] + table[:at]
    for _ in range(random.choice((1, 5, 50))):
        if table:
            table[random.randrange(len(table))] = random.choice(entries if change == 5 else [*table[:20], *entries])
    return table


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _kind(values: list[Any]) -> int:
    """The GGUF type that holds all of some values."""
    if any(isinstance(value, list) for value in values):
        return ARRAY
    if any(isinstance(value, str) for value in values):
        return STRING
    if all(isinstance(value, bool) for value in values) and values:
        return 7
    if any(isinstance(value, float) for value in values):
        return 6
    if any(value < 0 for value in values):
        return 11 if min(values) < -(2**31) or max(values) >= 2**31 else 5
    return 10 if max(values, default=0) >= 2**32 else 4


def _value(value: Any, kind: int) -> bytes:
    if kind == ARRAY:
        items = value if isinstance(value, list) else [value]
        inner = _kind(items)
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(item, inner) for item in items)
    if kind == STRING:
        return _text(str(value))
    if kind == 6:
        number = float(value)
        return struct.pack("<f", number if abs(number) < 3e38 else float("inf"))
    return struct.pack(LAYOUTS[kind], value if kind == 7 else int(value))


def header(base: Base, keys: dict[str, Any]) -> tuple[bytes, int]:
    """The header of a file, and the bytes of its tensors."""
    parts, offset = [b"GGUF" + struct.pack("<IQQ", 3, len(base.tensors), len(keys))], 0
    for name, value in keys.items():
        kind = ARRAY if isinstance(value, list) else _kind([value])
        parts.append(_text(name) + struct.pack("<I", kind) + _value(value, kind))
    for name, shape in base.tensors.items():
        parts.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, offset))
        size = 4
        for axis in shape:
            size *= axis
        offset += size + -size % 32
    return b"".join(parts), offset


def read_all(path: Path, *, whole: bool) -> None:
    """Read a file in all ways that concern its keys."""
    file = GgufFile(path)
    described(file)
    errors = []
    for read in (check, config, tokenizer):
        try:
            read(file)
        except BitwrightError as error:
            errors.append(error)
    if whole:
        GgufWeightSource(path)
    if errors:
        raise errors[0]


def check(file: GgufFile) -> None:
    """What is asked before anything else."""
    check_is_model(file.keys, file.tensors, str(file.path))
    file.check_vocabulary()
    ends_of(file.keys)


def config(file: GgufFile) -> None:
    """transformers' config."""
    config_of(file.keys, {name: t.shape for name, t in file.tensors.items()}, str(file.path), {})


def tokenizer(file: GgufFile) -> None:
    """The tokenizer, used once."""
    made = tokenizer_of(file.keys, str(file.path))
    made.decode(made(TEXT)["input_ids"])


def _alarm(_: int, __: FrameType | None) -> None:
    raise TooLongError


def one(number: int, known: list[Base], path: Path) -> str:
    """What became of an input: "read", "slow", the name of bitwright's error, or "FAILURE: …"."""
    random = Random(number)
    base = random.choice(known)
    keys = damaged(base.keys, random)
    head, size = header(base, keys)
    if random.random() < 0.2:
        raw = bytearray(head)
        for _ in range(random.randint(1, 8)):
            raw[random.randrange(8, len(raw))] = random.randrange(256)
        head = bytes(raw)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + -len(head) % 32 + size)
    whole = number % WHOLE == 0
    found = outcome(path, SECONDS, whole=whole)
    if found.startswith(f"FAILURE: {TooLongError.__name__}"):
        found = outcome(path, PATIENCE, whole=whole)
        found = found if found.startswith("FAILURE") else SLOW
    if found.startswith("FAILURE"):
        others = {n: v for n, v in keys.items() if n not in base.keys or repr(base.keys[n]) != repr(v)}
        gone = sorted(base.keys.keys() - keys.keys())
        shown = ", ".join(f"{n!r}: {str(v)[:60]!r}" for n, v in others.items())
        found += f"; base {base.keys['general.name']!r}, changed {{{shown}}}, without {gone}"
    return found


def outcome(path: Path, seconds: float, *, whole: bool) -> str:
    """What becomes of a file that is read within some seconds of processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        read_all(path, whole=whole)
    except BitwrightError as error:
        return type(error).__name__
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # panics of the tokenizers package among them
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILURE: {type(error).__name__}: {str(error)[:160]} ({Path(at.filename).name}:{at.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "read"


def fuzz(inputs: range) -> tuple[Counter[str], dict[int, str]]:
    """How often each outcome was met, and the failures by the number of their input."""
    known, met, failures = bases(), Counter[str](), dict[int, str]()
    old = signal.signal(signal.SIGPROF, _alarm)
    with tempfile.TemporaryDirectory() as place:
        for number in inputs:
            found = one(number, known, Path(place, "input.gguf"))
            met[found.split(":")[0]] += 1
            if number % 5000 == 4999:
                print(f"{number + 1}: {dict(met)}", file=sys.stderr, flush=True)
            if found.startswith("FAILURE"):
                failures[number] = found
                print(number, found, file=sys.stderr, flush=True)
    signal.signal(signal.SIGPROF, old)
    return met, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--memory", type=int, default=6, help="GB that the process may have")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 30, args.memory << 30))
    met, failures = fuzz(range(args.seed, args.seed + args.inputs))
    print(", ".join(f"{count} {what}" for what, count in met.most_common()))
    for number, failure in list(failures.items())[:50]:
        print(number, failure)


if __name__ == "__main__":
    main()
