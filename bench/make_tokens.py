"""Write the calibration windows that `bitwright quantize` would use, for peers to use the very same.

python -m bench.make_tokens MODEL TEXT OUT.safetensors --samples 128 --seqlen 256
"""

import argparse
from pathlib import Path

from bitwright.calibration import load_tokenizer, sample
from bitwright.checkpoint import write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    ids = sample(tokenizer, args.text, samples=args.samples, seqlen=args.seqlen, vocabulary=1 << 31, seed=0)
    write_shard(args.out, {"input_ids": ids})


if __name__ == "__main__":
    main()
