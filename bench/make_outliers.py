"""Give a Llama outlier channels, as large models have them, without changing what it computes.

    python -m bench.make_outliers MODEL OUT [--channels 3] [--factor 64]

The same few channels of every norm that the blocks read are multiplied by the factor, and the matching columns of the
matrices behind it divided. A power of two changes no digit of either, so the float model is the same to the bit.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from bitwright.files.checkpoint import Checkpoint, write_shard

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def with_outliers(tensors: dict[str, torch.Tensor], blocks: int, channels: int, factor: float) -> None:
    """Scale in place."""
    width = len(tensors["model.layers.0.input_layernorm.weight"])
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:channels]
    for block in range(blocks):
        for norm, readers in READERS.items():
            tensors[f"model.layers.{block}.{norm}.weight"][chosen] *= factor
            for reader in readers:
                tensors[f"model.layers.{block}.{reader}.weight"][:, chosen] /= factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--factor", type=float, default=64)
    args = parser.parse_args()
    source = Checkpoint(args.model)
    tensors = {name: source.read(name) for name in source.tensors}
    blocks = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    with_outliers(tensors, blocks, args.channels, args.factor)
    args.out.mkdir(parents=True)
    for file in args.model.glob("*.json"):
        if "safetensors" not in file.name:
            shutil.copy(file, args.out)
    write_shard(args.out / "model.safetensors", tensors)


if __name__ == "__main__":
    main()
