"""Quantize a model with GPTQModel, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh gptqmodel
    bench/peers/envs/gptqmodel/bin/python bench/peers/gptqmodel_gptq.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128 | channel] [--asym | --sym] [--dtype auto | float32]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers but
lm_head are quantized. Whatever is not named here is GPTQModel's default (dampening 0.05, columns ordered by activation
within groups and groups among themselves, one window per batch). That order needs groups; with --group channel, where its
default would end in an error, columns are ordered over the whole row (desc_act).

With --sym, OUT is its GPTQ v1 file. With --asym that file would not do: v1 stores zero point - 1, so the zero point 0 wraps
around, and at 2, 4 and 8 bits borrows from the next zero point of the word. GPTQModel undoes that when it loads the file; a
reader that takes field by field gets other weights. So --asym is quantized to v2, which stores zero points as they are, and
OUT holds float32 weights: what GPTQModel's own dequantizer makes of that.

The first run compiles a kernel for packing, which stays in ~/.cache/gptqmodel: time the second.
What it prints is described in peer.py.
"""

import os
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from peer import arguments, reporting


def quantize(args: Namespace, out: Path) -> None:
    """Run GPTQModel as the arguments of the command line say; save to `out` in its GPTQ format, v2 if asymmetric."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group,
        sym=args.symmetric,
        desc_act=True if args.group == -1 else None,  # None: by default
        format="gptq" if args.symmetric else "gptq_v2",
        device="cpu",
    )
    dtype = torch.float32 if args.dtype == "float32" else "auto"  # it takes any other string for "auto"
    loaded = GPTQModel.load(str(args.model), config, dtype=dtype)
    ids = load_file(args.tokens)["input_ids"]
    loaded.quantize([{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in ids])
    loaded.save(str(out))


def decode(packed: Path, out: Path) -> None:
    """Save to `out` the float32 weights that GPTQModel reads from the checkpoint `packed`."""
    import torch
    from gptqmodel.utils.model_dequant import dequantize_model

    dequantize_model(packed, out, target_dtype=torch.float32)


def main() -> None:
    parser = arguments(__doc__, bits=(2, 3, 4, 8))
    args = parser.parse_args()
    if args.tokens is None:
        parser.error("GPTQModel needs --tokens")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by itself it takes half of the cores
    with reporting(), TemporaryDirectory() as scratch:
        packed = args.out if args.symmetric else Path(scratch) / "packed"
        quantize(args, packed)
        if not args.symmetric:
            decode(packed, args.out)


if __name__ == "__main__":
    main()
