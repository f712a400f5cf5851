"""How nearly two programs can agree on a file whose inputs both round to 8 bits: as nearly as one agrees with itself, nudged.

    python -m bench.gguf_nudged [--model wiki-llama-7m] [--mix Q4_K_M] [--tokens 6144]

What enters the first block is multiplied by 1 + 1e-7, then by 1 + 1e-6; printed is the root mean square by which log p
of a token moves, in float and as llama.cpp computes. Of a file that bench.gguf_vs_llamacpp left behind.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bench.gguf_vs_llamacpp import WINDOW, case_of, judged_windows
from bench.measure import OUT, table
from bitwright.gguf.input_rounding import ENGINE
from bitwright.models.streamed import StreamedModel


def log_p(file: Path, ids: Tensor, engine: str | None, nudge: float = 0.0) -> Tensor:
    """Of the tokens [W, T − 1] behind each window's first."""
    streamed = StreamedModel(file, engine=engine)
    embed = streamed.skeleton.embed
    streamed.skeleton.embed = lambda tokens: embed(tokens) * (1 + nudge)  # type: ignore[method-assign]
    logits = torch.cat([streamed.head(hidden)[:, :-1] for hidden in streamed.hidden(ids)])
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wiki-llama-7m")
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--tokens", type=int, default=6144)
    args = parser.parse_args()
    work = OUT / "gguf" / args.model
    case, file = case_of(args.model, work), work / f"mine-{args.mix}.gguf"
    ids, rows = judged_windows(case)[: args.tokens // WINDOW], []
    plain = {engine: log_p(file, ids, engine) for engine in (None, ENGINE)}
    rows.append(["in float, as llama.cpp does", f"{float((plain[ENGINE] - plain[None]).square().mean().sqrt()):.1e}"])
    for engine in plain:
        for nudge in (1e-7, 1e-6):
            moved = log_p(file, ids, engine, nudge) - plain[engine]
            rows.append([f"{engine or 'in float'}, nudged by {nudge:g}", f"{float(moved.square().mean().sqrt()):.1e}"])
    print(table([f"{args.model} {args.mix}", "root mean square of what log p moves by"], rows))


if __name__ == "__main__":
    main()
