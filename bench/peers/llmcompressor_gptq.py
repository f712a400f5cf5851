"""Quantize a model with llm-compressor, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh llmcompressor
    bench/peers/envs/llmcompressor/bin/python bench/peers/llmcompressor_gptq.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128 | channel] [--asym | --sym] [--dtype auto | float32] [--method gptq | awq | rtn]
        [--activations int8-token] [--prune sparsegpt:0.5 | wanda:2:4]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers
but lm_head are quantized to integers with one scale (and zero point) per group or row, and the checkpoint is saved
pack-quantized to OUT with the tokenizer. Whatever is not named here is llm-compressor's default (GPTQ: blocks of 128,
dampening 0.01, static activation order; AWQ: its own mappings for the architecture, 20 exponents, both activations and
weights in the scales, then rounding to nearest; one window per batch). `rtn` rounds to nearest without calibration.
With --activations every layer's inputs are rounded too, token by token as they come, and OUT is int-quantized. With --prune
the same layers are pruned instead (SparseGPT: blocks of 128, dampening 0.01), and OUT is a float checkpoint.

What it prints is described in peer.py.
"""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from peer import arguments, reporting

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from datasets import Dataset
    from llmcompressor.modifiers import Modifier


def calibration_set(path: Path) -> "Dataset":
    """The windows as llm-compressor takes them; nothing is masked."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file

    ids = load_file(path)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise ValueError(f"{path}: input_ids must be int64 [samples, seqlen], not {ids.dtype} {list(ids.shape)}")
    return Dataset.from_dict({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})


def scheme(bits: int, group: int, symmetric: bool, inputs: bool) -> "QuantizationScheme":
    """Integer weights of every Linear, one scale per group, or per row for a group of -1; inputs: rounded to int8 too."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationType

    weights = QuantizationArgs(num_bits=bits, type=QuantizationType.INT, group_size=group, symmetric=symmetric)
    by_token = QuantizationArgs(num_bits=8, type=QuantizationType.INT, strategy="token", symmetric=True, dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=by_token if inputs else None)


def recipe(method: str, weights: "QuantizationScheme") -> list["Modifier"]:
    """What llm-compressor is to do, in this order."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    chosen = {"config_groups": {"group_0": weights}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**chosen)]
    return [*([AWQModifier()] if method == "awq" else []), QuantizationModifier(**chosen)]


def pruning(how: str) -> list["Modifier"]:
    """METHOD:SHARE or METHOD:N:M as llm-compressor says it."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    method, amount = how.split(":", 1)
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    zeros, _, among = amount.partition(":")
    share = int(zeros) / int(among) if among else float(zeros)
    return [kind(sparsity=share, mask_structure=amount if among else "0:0", targets=["Linear"], ignore=["lm_head"])]


def quantize(args: Namespace) -> None:
    """Run llm-compressor as the arguments of the command line say."""
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    data: dict[str, Any] = {}
    if args.method != "rtn":
        windows = calibration_set(args.tokens)
        data = {"dataset": windows, "num_calibration_samples": len(windows), "shuffle_calibration_samples": False}
    todo = pruning(args.prune) if args.prune else []
    # AWQ pins its cache for copies to an accelerator; without one, torch refuses to. It changes no number.
    with patch.object(IntermediatesCache, "pin_memory", lambda *_: None):
        oneshot(
            model=str(args.model),
            tokenizer=str(args.model),
            precision=args.dtype,
            recipe=todo
            or recipe(args.method, scheme(args.bits, args.group, args.symmetric, args.activations is not None)),
            output_dir=str(args.out),
            **data,
        )


def main() -> None:
    parser = arguments(__doc__, bits=range(1, 9))
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--activations", choices=("int8-token",))
    parser.add_argument("--prune", metavar="METHOD:AMOUNT")
    args = parser.parse_args()
    if args.method != "rtn" and args.tokens is None:
        parser.error(f"{args.method} needs --tokens")
    with reporting():
        quantize(args)


if __name__ == "__main__":
    main()
