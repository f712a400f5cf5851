"""Why a file's perplexity is what it is: its KL, how sure it is, and what is left.

    python -m bench.gguf_likelihood [--models wiki-llama-7m,tiny1m-llama] [--mixes Q4_0,Q6_K] [--tokens 24576]

For the files that bench.gguf_vs_llamacpp left behind. −log p of a text above the float model's is about KL + slope · sharper +
luck. `sharper`: how much steeper the file's log q are than the float model's log p, regressed under p; `slope`: how fast −log p
of this text rises with the size of the float model's logits, above 0 where it is surer than the text allows.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bench.gguf_vs_llamacpp import MIXES, WINDOW, case_of, judged_windows
from bench.measure import OUT, table
from bitwright.models.skeleton import TOKENS_PER_BATCH, batches
from bitwright.models.streamed import StreamedModel


def compared(streamed: StreamedModel, file: Path, hidden: list[Tensor], ids: Tensor) -> Tensor:
    """By window [5, W]: KL, −log p above the float model's, cov(log p, log q − log p), var(log p), slope.

    streamed, hidden: the float model, and what its last block gives for the windows ids [W, T].
    """
    other, found = StreamedModel(file), []
    for a, b, part in zip(hidden, other.hidden(ids), batches(ids, TOKENS_PER_BATCH), strict=True):
        log_p, log_q = (w.head(h)[:, :-1].log_softmax(-1) for w, h in ((streamed, a), (other, b)))
        p, missed, target = log_p.exp(), log_q - log_p, part[:, 1:, None]
        centred = log_p - (p * log_p).sum(-1, keepdim=True)
        terms = (-p * missed, p * centred * missed, p * centred.square())
        kl, cov, var = (term.sum(-1) for term in terms)
        above, slope = (-t.gather(-1, target)[..., 0] for t in (missed, centred))
        found.append(torch.stack([t.double().mean(1) for t in (kl, above, cov, var, slope)]))
    return torch.cat(found, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wiki-llama-7m,tiny1m-llama")
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--tokens", type=int, default=24576)
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        work = OUT / "gguf" / name
        case = case_of(name, work)
        streamed, ids = StreamedModel(case.model), judged_windows(case)[: args.tokens // WINDOW]
        hidden = streamed.hidden(ids)
        for mix in args.mixes.split(","):
            for whose in ("mine", "theirs"):
                found = compared(streamed, work / f"{whose}-{mix}.gguf", hidden, ids)
                kl, above, cov, var, slope = found.mean(1).tolist()
                error = float(found[1].std()) / len(ids) ** 0.5
                expected = kl + slope * cov / var
                figures = [f"{kl:.5f}", f"{above:+.5f} ± {error:.5f}", f"{100 * cov / var:+.2f} %", f"{expected:+.5f}"]
                rows.append([name, mix, whose, *figures, f"{slope:+.3f}"])
    print(
        table(["model", "mix", "file", "KL", "−log p above float's", "sharper", "KL + slope · sharper", "slope"], rows)
    )


if __name__ == "__main__":
    main()
