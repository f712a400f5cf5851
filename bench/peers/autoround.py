"""Quantize a model with the auto-round package, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh llmcompressor          # brings auto-round along
    bench/peers/envs/llmcompressor/bin/python bench/peers/autoround.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128 | channel] [--asym | --sym] [--dtype auto | float32] [--iterations 200]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers but
lm_head are quantized, and the checkpoint is saved in float, as its codes decode ("fake"): GPTQ files, which it also writes,
cannot hold the zero point 0. Whatever is not named here is auto-round's default.
What it prints is described in peer.py.
"""

from argparse import Namespace

from peer import arguments, reporting


def quantize(args: Namespace) -> None:
    """Run auto-round as the arguments of the command line say."""
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(args.tokens)["input_ids"]
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype),
        AutoTokenizer.from_pretrained(args.model),
        scheme=f"W{args.bits}A16",
        bits=args.bits,
        group_size=args.group,
        sym=args.symmetric,
        iters=args.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[{"input_ids": window[None]} for window in ids],
        device_map="cpu",
    )
    rounder.quantize_and_save(str(args.out), format="fake")
    for folder in [path for path in args.out.iterdir() if path.is_dir()]:  # it saves to a folder of its own inside
        for file in folder.iterdir():
            file.rename(args.out / file.name)
        folder.rmdir()


def main() -> None:
    parser = arguments(__doc__, bits=(2, 3, 4, 8))
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    if args.tokens is None:
        parser.error("auto-round needs --tokens")
    with reporting():
        quantize(args)


if __name__ == "__main__":
    main()
