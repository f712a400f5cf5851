"""Quantize a model with llm-compressor, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh llmcompressor
    bench/peers/envs/llmcompressor/bin/python bench/peers/llmcompressor_gptq.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128] [--asym | --sym] [--method gptq | rtn]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers
but lm_head are quantized to integers with one scale (and zero point) per group, and the checkpoint is saved
pack-quantized to OUT with the tokenizer. Whatever is not named here is llm-compressor's default (GPTQ: blocks of 128,
dampening 0.01, static activation order, one window per batch). `rtn` rounds to nearest without calibration.

What it prints is described in peer.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from peer import arguments, reporting

if TYPE_CHECKING:
    from datasets import Dataset


def calibration_set(path: Path) -> "Dataset":
    """The windows as llm-compressor takes them; nothing is masked."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file

    ids = load_file(path)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise ValueError(f"{path}: input_ids must be int64 [samples, seqlen], not {ids.dtype} {list(ids.shape)}")
    return Dataset.from_dict({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})


def quantize(model: Path, out: Path, tokens: Path | None, bits: int, group: int, symmetric: bool) -> None:
    """Run llm-compressor on `model` and save to `out`: GPTQ on `tokens`, or round-to-nearest if there are none."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP,
        group_size=group,
        symmetric=symmetric,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if tokens is None:
        modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        oneshot(model=str(model), tokenizer=str(model), recipe=modifier, output_dir=str(out))
        return
    windows = calibration_set(tokens)
    oneshot(
        model=str(model),
        tokenizer=str(model),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        dataset=windows,
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def main() -> None:
    parser = arguments(__doc__, bits=range(1, 9))
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    args = parser.parse_args()
    if args.method == "gptq" and args.tokens is None:
        parser.error("gptq needs --tokens")
    tokens = args.tokens if args.method == "gptq" else None
    with reporting():
        quantize(args.model, args.out, tokens, args.bits, args.group, args.symmetric)


if __name__ == "__main__":
    main()
