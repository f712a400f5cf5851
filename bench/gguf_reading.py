"""Every type of file that llama-quantize writes, read back: equal to what the gguf package makes of it, evaluated, and loaded.

    python -m bench.gguf_reading [--types IQ2_XXS,TQ1_0]

A line a type: the block types in the file; how many tensors are, number by number, those of the gguf package's own reader
and `dequantize`; what `bitwright inspect` and `bitwright eval` say; how far the logits of `bitwright.load`, which multiplies
the packed codes, are from those of the decoded weights, and the bits a weight of its matrices takes in memory. `bitwright
generate` must write on from each. Q1_0, which the package does not decode, is compared with llama-perplexity instead. Left out
is Q2_0, a type that the package does not know. Needs ../shared and `bench/peers/install.sh llamacpp`.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

import bitwright
from bench.gguf_vs_llamacpp import WINDOW, judged_by_llama, judged_windows, llama_perplexity, losses, prepared, tool
from bench.measure import BITWRIGHT, OUT, run, table
from bitwright.gguf.reader import GgufFile
from bitwright.inference.dense import Dense
from bitwright.inference.qlinear import QLinear
from bitwright.inference.speed import bytes_per_token
from bitwright.models.streamed import StreamedModel

TYPES = (
    "F32,F16,BF16,Q4_0,Q4_1,Q5_0,Q5_1,Q8_0,Q2_K,Q2_K_S,Q3_K_S,Q3_K_M,Q3_K_L,Q4_K_S,Q4_K_M,Q5_K_S,Q5_K_M,Q6_K,IQ1_S,IQ1_M,IQ2_XXS,"
    "IQ2_XS,IQ2_S,IQ2_M,IQ3_XXS,IQ3_XS,IQ3_S,IQ3_M,IQ4_NL,IQ4_XS,TQ1_0,TQ2_0,MXFP4,NVFP4,Q1_0"
)
BY_TENSOR = ("MXFP4", "NVFP4")  # which no mix gives to a model without experts


def alike(file: Path) -> tuple[int, int]:
    """How many tensors read as the gguf package reads them, and how many there are."""
    mine, theirs = GgufFile(file), gguf.GGUFReader(file)
    same = 0
    for t in theirs.tensors:
        found = mine.read(t.name).float().numpy()
        expected = dequantize(t.data, t.tensor_type).astype(np.float32)
        same += found.shape == expected.shape and bool(np.array_equal(found, expected))
    return same, len(theirs.tensors)


@torch.no_grad()
def loaded(file: Path, ids: Tensor) -> tuple[float, float]:
    """Mean KL of what `load` computes from what the decoded weights do, on tokens [W, T]; bits of a weight of its matrices."""
    streamed, model = StreamedModel(file), bitwright.load(file)
    exact = streamed.skeleton.head(torch.cat(streamed.hidden(ids))).log_softmax(-1)
    found = model(ids).logits.log_softmax(-1)
    count = sum(m.out_features * m.in_features for m in model.modules() if isinstance(m, QLinear | Dense))
    return float((exact.exp() * (exact - found)).sum(-1).mean()), 8 * bytes_per_token(model) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    args = parser.parse_args()
    work = OUT / "gguf-reading"
    case, source, imatrix = prepared("wiki-llama-7m", work)
    file = work / "theirs.gguf"
    judge = ["--reference", str(case.model), "--text", str(case.text), "--tokens", "2048", "--json"]
    ids = judged_windows(case)[:4]
    rows = []
    for kind in args.types.split(","):
        how = ["--tensor-type", f"blk={kind.lower()}"] if kind in BY_TENSOR else []
        tool("llama-quantize", "--imatrix", str(imatrix), *how, str(source), str(file), "Q8_0" if how else kind, "2")
        types = Counter(t.type.name for t in GgufFile(file).tensors.values() if len(t.shape) > 1)
        if kind == "Q1_0":
            theirs, _ = llama_perplexity(case, file, work)
            ours = math.exp(float(losses(file, judged_by_llama(file, work), WINDOW // 2).mean()))
            read = f"perplexity {ours:.2f}, llama-perplexity's {theirs:.2f}"
        else:
            read = "{} of {}".format(*alike(file))
        seen = run([*BITWRIGHT, "inspect", str(file), "--json"]).result
        judged = run([*BITWRIGHT, "eval", str(file), *judge]).result
        said = run(
            [*BITWRIGHT, "generate", str(file), "--prompt", "In the year", "--max-tokens", "16", "--json"]
        ).result
        if not said["text"].strip():
            sys.exit(f"nothing is written by {kind}")
        far, bits = loaded(file, ids)
        cells = [kind, ", ".join(f"{n} {name}" for name, n in types.most_common()), read]
        cells += [f"{seen['bits_per_weight']:.2f}", f"{judged['kl_mean']:.5f}", f"{judged['perplexity']:.2f}"]
        cells += [f"{far:.1e}", f"{bits:.2f}"]
        rows.append(cells)
        print(cells, flush=True)
    header = [
        "type",
        "blocks",
        "tensors alike",
        "bits per weight",
        "KL",
        "perplexity",
        "KL of loaded",
        "bits in memory",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
