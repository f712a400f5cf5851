"""Scale search alone, type by type, beside llama-quantize: squared errors of each tensor, weighted by an importance matrix or
not, no error feedback on either side.

    python -m bench.gguf_errors [--types Q4_K,Q2_K]

A line a type: how much of llama-quantize's error is left, the mean over all tensors and the worst tensor. Needs ../shared
and `bench/peers/install.sh llamacpp`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bench.gguf_vs_llamacpp import prepared, tool
from bench.measure import BITWRIGHT, OUT, run, table
from bitwright.gguf.imatrix import read
from bitwright.models.gguf_source import GgufWeightSource

TYPES = "Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_NL,IQ4_XS,TQ2_0"


def errors(file: Path, original: GgufWeightSource, importance: dict[str, Tensor] | None) -> Tensor:
    """Σ importance · (w − q)² of each matrix of the blocks."""
    found, weight_source = [], GgufWeightSource(file)
    for name, stored in weight_source.stored.items():
        if stored.startswith("blk") and len(weight_source.shapes[name] or ()) == 2:
            missed = (weight_source.read(name).float() - original.read(name).float()).square()
            weight = torch.ones(missed.shape[1]) if importance is None else importance[stored]
            found.append((missed * weight).sum())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    args = parser.parse_args()
    work = OUT / "gguf-errors"
    case, source, imatrix = prepared("wiki-llama-7m", work)
    original, importance = GgufWeightSource(source), read(imatrix)
    rows = []
    for kind in args.types.split(","):
        cells = [kind]
        for known in (None, importance):
            mine, theirs = work / "mine.gguf", work / "theirs.gguf"
            mine.unlink(missing_ok=True)
            scheme = kind if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "TQ2_0") else kind.lower()
            calib = "none" if known is None else str(imatrix)
            how = ["--scheme", scheme, "--pure", "--method", "search", "--calib", calib, "--json"]
            run([*BITWRIGHT, "quantize", str(case.model), str(mine), *how], fine=(0, 1))
            weighed = [] if known is None else ["--imatrix", str(imatrix)]
            peer = kind + "_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind
            tool("llama-quantize", "--pure", *weighed, str(source), str(theirs), peer, "2")
            left = errors(mine, original, known) / errors(theirs, original, known)
            cells += [f"{left.mean():.3f}", f"{left.max():.3f}"]
        rows.append(cells)
        print(cells, flush=True)
    print(table(["type", "data-free, mean", "worst", "weighted, mean", "worst"], rows))


if __name__ == "__main__":
    main()
