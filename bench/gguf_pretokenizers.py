"""Every name that llama.cpp has for a pre-tokenizer: its tokens of many texts beside those of the tokenizer that is read here.

    python -m bench.gguf_pretokenizers VOCABULARY.gguf [--names gpt-2,tekken] [--texts FILE ...]

VOCABULARY: a file of byte-level BPE (SmolLM2's) whose tokens and merges are taken. A line a name: how many texts become the
same tokens, and the first that does not. Needs `bench/peers/install.sh xllamacpp`.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bench.measure import ROOT
from bitwright.formats.gguf_writer import FLOAT_TYPES, GgufWriter
from bitwright.gguf.pretokenizers import PRE_TOKENIZERS
from bitwright.gguf.probes import ORDINARY, RARE
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tokenizer import tokenizer_of

ORACLE = ROOT / "bench/peers/envs/xllamacpp/bin/python"
WIDTH = 32
KEYS: dict[str, Any] = {
    "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": WIDTH, "llama.block_count": 1,
    "llama.feed_forward_length": WIDTH, "llama.attention.head_count": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
PIECE, PIECES = 400, 300  # characters of a text, and how many of each file


def answers(jobs: list[dict[str, Any]], oracle: Path = ORACLE) -> list[dict[str, Any]]:
    """What llama.cpp makes of files; see bench/peers/llamacpp_oracle.py."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "jobs.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(jobs))
        script = ROOT / "bench/peers/llamacpp_oracle.py"
        subprocess.run([str(oracle), str(script), str(asked), str(told)], check=True, capture_output=True)
        return list(json.loads(told.read_text()))


def small_model(path: Path, vocabulary: dict[str, Any]) -> None:
    """A model of nearly no weights with this tokenizer."""
    count = len(vocabulary["tokenizer.ggml.tokens"])
    shapes = {
        "token_embd": (count, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
    }
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in matrices}
    tensors = {f"{name}.weight": torch.full(shape, 0.01) for name, shape in shapes.items()}
    described = [(name, FLOAT_TYPES[torch.float32], tensor) for name, tensor in tensors.items()]
    with GgufWriter(path, KEYS | vocabulary, described) as file:
        for name, tensor in tensors.items():
            file.put_floats(name, tensor)


def over_characters(own: dict[str, Any]) -> dict[str, Any]:
    """The same vocabulary in characters, with spaces as ▁, line ends as they are, and all bytes to fall back on."""
    letters = bytes_to_unicode()
    byte_of = {letter: byte for byte, letter in letters.items()}

    def plain(token: str) -> str:
        try:
            return bytes(byte_of[letter] for letter in token).decode().replace(" ", "▁")
        except (KeyError, UnicodeDecodeError):
            return ""

    tokens, kinds = own["tokenizer.ggml.tokens"], own["tokenizer.ggml.token_type"]
    known: dict[str, int] = {}
    for token, kind in zip(tokens, kinds, strict=True):
        text = token if kind != TokenType.NORMAL else plain(token)
        if text and not (kind == TokenType.NORMAL and "\n" in text.strip("\n")):
            known.setdefault(text, int(kind))
    known |= {f"<0x{byte:02X}>": int(TokenType.BYTE) for byte in range(256)}
    merges = [[plain(part) for part in merge.split(" ")] for merge in own["tokenizer.ggml.merges"]]
    kept = [" ".join(pair) for pair in merges if all(pair) and "".join(pair) in known and "\n" not in "".join(pair)]
    ids = {"tokenizer.ggml.tokens": list(known), "tokenizer.ggml.token_type": list(known.values())}
    return own | ids | {"tokenizer.ggml.merges": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--names", default=",".join(PRE_TOKENIZERS))
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--oracle", type=Path, default=ORACLE)
    args = parser.parse_args()
    source = GgufFile(args.vocabulary)
    own = {name: value for name, value in source.keys.items() if name.startswith("tokenizer.ggml.")}
    own |= {name: value.tolist() for name, value in own.items() if hasattr(value, "tolist")}
    texts = [*ORDINARY, *RARE]
    for file in args.texts:
        text = file.read_text(encoding="utf-8")
        texts += [text[at : at + PIECE] for at in range(0, min(len(text), PIECE * PIECES), PIECE)]
    for name in args.names.split(","):
        keys = (own if PRE_TOKENIZERS[name].bytes else over_characters(own)) | {"tokenizer.ggml.pre": name}
        with tempfile.TemporaryDirectory() as folder:
            small_model(Path(folder, "a.gguf"), keys)
            found = answers([{"file": f"{folder}/a.gguf", "texts": texts}], args.oracle)[0]
        if "error" in found:
            print(f"{name}: not known to this llama.cpp", flush=True)
            continue
        mine = tokenizer_of(keys, name)(texts)["input_ids"]
        odd = [i for i, (a, b) in enumerate(zip(found["tokens"], mine, strict=True)) if a != b]
        first = f"; the first other {texts[odd[0]]!r}: {found['tokens'][odd[0]]}, here {mine[odd[0]]}" if odd else ""
        print(f"{name}: {len(texts) - len(odd)} of {len(texts)} texts the same{first}", flush=True)


if __name__ == "__main__":
    main()
