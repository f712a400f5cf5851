"""What the kernels' rounding of inputs costs: perplexity of loaded models beside that of their decoded weights in float.

    python -m bench.kernel_quality [--schemes int4-g128,nf4-g64,q4_k] [--tokens 16384]

wiki-llama-7m, rounded without data, judged on WikiText-2's test text; and the relative error of all logits. Needs ../shared.
"""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.measure import BITWRIGHT, SHARED, run, table
from bitwright.calibration.windows import load_tokenizer
from bitwright.inference.loading import load
from bitwright.models.streamed import StreamedModel

WINDOW = 256


def decoded(path: Path, ids: Tensor) -> Tensor:
    """Logits [W, T, V] by decoded weights, in float32."""
    streamed = StreamedModel(path)
    return streamed.skeleton.head(torch.cat(streamed.hidden(ids)))


@torch.no_grad()
def loaded(path: Path, ids: Tensor, bits: int) -> Tensor:
    """Logits [W, T, V] by the kernels."""
    model = load(path, activations=bits)
    return torch.cat([model(part).logits for part in ids.split(8)])


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """Of every token but each window's first."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(float(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="int4-g128,int8-channel,nf4-g64,q4_k,q6_k")
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    model = SHARED / "models/wiki-llama-7m"
    text = (SHARED / "text/wikitext2_raw_test.txt").read_text()[: 8 * args.tokens]
    ids = torch.tensor(load_tokenizer(model).encode(text)[: args.tokens]).view(-1, WINDOW)
    rows = []
    for scheme in args.schemes.split(","):
        with TemporaryDirectory() as folder:
            out = Path(folder) / "q"
            options = ["--scheme", scheme, "--format", "bitwright", "--method", "search", "--calib", "none", "--json"]
            run([*BITWRIGHT, "quantize", str(model), str(out), *options])
            exact = decoded(out, ids)
            row = [scheme, f"{perplexity(exact, ids):.3f}"]
            for bits in (16, 8):
                mine = loaded(out, ids, bits)
                row += [f"{perplexity(mine, ids):.3f}", f"{float((mine - exact).norm() / exact.norm()):.1e}"]
            rows.append(row)
    print(table(["scheme", "decoded", "inputs of 16 bits", "error of logits", "of 8 bits", "error of logits"], rows))


if __name__ == "__main__":
    main()
