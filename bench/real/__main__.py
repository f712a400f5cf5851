"""Ours and the peers on real language models, one command a table (markdown, on standard output):

    python -m bench.real gguf       ours beside llama-quantize with llama-imatrix, mix by mix
    python -m bench.real tensors    int4 to int2 and W8A8: our methods beside llm-compressor, auto-round, GPTQModel
    python -m bench.real methods    method by model and scheme, models with outlier channels among them
    python -m bench.real robust     method by calibration text and judged text, and by 8 to 512 windows
    python -m bench.real all        all of them

Every tool is calibrated on the windows that `bitwright quantize` draws (--samples of --seqlen tokens; llama-imatrix tokenizes
their text for itself) and judged by `bitwright eval` on the first --tokens tokens of WikiText-2's test text, in windows of
--window: KL to the float model over its 512 likeliest tokens and all others together.
The models are made by ../shared/models/real.py in --models, once; --names of them, or of those in ../shared/models; a Llama's
name with +outliers has three channels 64 times as large (bench/make_outliers.py). A peer that is not installed
(bench/peers/install.sh llamacpp, llmcompressor, gptqmodel) has no rows; --tools says which may run at all, by the beginnings
of their names. Results are kept in bench/out/real/results.jsonl, ours for as long as the sources are the same: an interrupted
bench goes on where it was. A method is one of --method's, `default` is none given; options of a recipe's may stand behind:
gptq:damping=0.1:sweeps=0.
"""

import argparse
from pathlib import Path

from bench.measure import OUT
from bench.real import gguf, methods, robust, tensors
from bench.real.material import Material
from bench.real.results import Bench, Judge
from bench.real.tools import TOOLS

PARTS = {"gguf": gguf, "tensors": tensors, "methods": methods, "robust": robust}


def _list(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def parsed() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line; what a part has a default of its own for is None if not given."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"])
    parser.add_argument("--models", type=Path, default=OUT / "real", metavar="FOLDER")
    parser.add_argument("--names", type=_list, help="of models")
    parser.add_argument("--mixes", type=_list, help="of gguf")
    parser.add_argument("--schemes", type=_list, help="of the other parts; int8-channel+int8-token rounds inputs too")
    parser.add_argument("--methods", type=_list, help="of ours")
    parser.add_argument("--tools", type=_list, default=tuple(TOOLS), help=", ".join(TOOLS))
    parser.add_argument("--calib", type=_list, help="wiki, c4, code, tinystories, or what `quantize --calib` takes")
    parser.add_argument("--samples", type=int, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in one")
    parser.add_argument("--curve", type=_list, help="of robust: numbers of windows")
    parser.add_argument("--texts", type=_list, help="of robust: texts to judge on, wikitext2, c4 or code")
    parser.add_argument("--tokens", type=int, default=Judge.tokens)
    parser.add_argument("--window", type=int, default=Judge.window)
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parsed()
    if args.part is None:
        parser.print_help()
        return
    work = OUT / "real"
    work.mkdir(parents=True, exist_ok=True)
    tools = tuple(name for name in TOOLS if any(name.startswith(begin) for begin in args.tools))
    bench = Bench(Material(args.models, work), tools, Judge(tokens=args.tokens, window=args.window))
    for name in PARTS if args.part == "all" else (args.part,):
        if args.part == "all":
            print(f"\n## {name}\n", flush=True)
        PARTS[name].main(bench, args)


if __name__ == "__main__":
    main()
