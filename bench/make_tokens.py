"""Write the calibration windows that `bitwright quantize` would use, for peers to use the very same.

python -m bench.make_tokens MODEL TEXT OUT.safetensors --samples 128 --seqlen 256 [--text WINDOWS.txt]

WINDOWS.txt is the windows as a text, for tools that tokenize for themselves. Where the tokenizer begins a text with a token
of its own, that token's name stands before each window but the first, whose own the tool adds.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.calibration.windows import load_tokenizer, sample
from bitwright.files.checkpoint import write_shard


def as_text(tokenizer: Any, ids: Tensor) -> str:
    """The windows' text. ids [S, T]."""
    first = ids[0, 0].item()
    own = first if first == tokenizer.bos_token_id and bool((ids[:, 0] == first).all()) else None
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids.flatten().tolist()[own is not None :], **plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("source", metavar="text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    ids = sample(tokenizer, args.source, samples=args.samples, seqlen=args.seqlen, vocabulary=1 << 31, seed=0)
    write_shard(args.out, {"input_ids": ids})
    if args.text is not None:
        args.text.write_text(as_text(tokenizer, ids))


if __name__ == "__main__":
    main()
