"""A float GGUF file of a checkpoint, for llama.cpp's tools: its own converter refuses tokenizers that it has no hash of.

python -m bench.make_gguf MODEL OUT.gguf
"""

import argparse
from pathlib import Path

import torch

from bitwright.calibration import load_tokenizer
from bitwright.checkpoint import Checkpoint
from bitwright.llamacpp import export
from bitwright.models import Skeleton, read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    skeleton, checkpoint = Skeleton(read_config(args.model), torch.float32), Checkpoint(args.model)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    tied = skeleton.tied_names()
    names = skeleton.source_names(shapes, str(args.model)).items()
    pieces = [export.Piece(parameter, source, None) for parameter, source in names if parameter not in tied]
    keys = export.metadata(args.model, skeleton.config, load_tokenizer(args.model), None)
    files = sorted({info.file for info in checkpoint.tensors.values()})
    export.write(args.out, keys, pieces, files, skeleton.config)


if __name__ == "__main__":
    main()
