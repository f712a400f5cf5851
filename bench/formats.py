"""One model in every file format that holds a scheme: do `bitwright.load`s of them compute the same?

    OMP_NUM_THREADS=1 python -m bench.formats MODEL [--tokens 64] [--schemes int4-g64,q4_0,nf4-g64-dq]

For each scheme the model is rounded to nearest, without data: once for the first format, and converted from there to the
others, number by number, so that all differences are of reading and computing; and again for every other format by itself,
under the scales that its files store (bfloat16, float16, float32), so that some weights near the middle of two codes get the
other one. Printed for every pair: the relative difference of all decoded matrices, of the logits on a short text, KL in nats,
and the share of tokens with the same likeliest successor. The first row of a scheme compares with the float model.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.measure import table
from bitwright import load, quantize
from bitwright.calibration.windows import load_tokenizer, read_text
from bitwright.errors import FormatError
from bitwright.models.config import read_config
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import names_in, open_weights
from bitwright.pipeline.conversion import convert

FORMATS = {  # scheme -> formats that hold it; the others are converted from the first
    "int4-g64": ("gptq", "bitwright", "compressed-tensors", "awq"),
    "q4_0": ("gguf", "bitwright"),
    "nf4-g64-dq": ("bitsandbytes", "bitwright"),
}


@dataclass(frozen=True)
class Made:
    """A model in one format: what it is called in the table, where it lies, its logits [T, V]."""

    name: str
    path: Path
    logits: Tensor


def made(model: Path, scheme: str, work: Path, ids: Tensor) -> Iterator[Made]:
    """The scheme in every format, converted and by itself; a conversion that is refused is left out, and the reason printed."""
    first = FORMATS[scheme][0]
    options = {"scheme": scheme, "method": "rtn", "calib": "none", "pure": first == "gguf"}
    original = work / ("first.gguf" if first == "gguf" else "first")
    quantize(model, original, format=first, **options)
    yield Made(first, original, logits(original, ids))
    for name in FORMATS[scheme][1:]:
        converted, alone = work / f"{name}-converted", work / name
        try:
            convert(original, converted, name)
            yield Made(f"{name}, converted", converted, logits(converted, ids))
        except FormatError as error:
            print(f"{scheme} of {first} is not converted to {name}: {error.message}")
        quantize(model, alone, format=name, **{**options, "pure": False})
        yield Made(f"{name}, by itself", alone, logits(alone, ids))


@torch.no_grad()
def logits(path: Path, ids: Tensor) -> Tensor:
    """Logits [T, V] of a loaded model."""
    return load(path)(ids[None]).logits[0].float()


def matrices(path: Path) -> Iterator[Tensor]:
    """All matrices of the blocks [N, K], decoded, in the model's order."""
    skeleton = Skeleton(read_config(path), torch.float32)
    source = open_weights(path, skeleton)
    names = names_in(source, skeleton)
    for index in range(len(skeleton)):
        for name, module in skeleton.linears(index).items():
            weight = source.read(names[f"{name}.weight"]).float()
            yield weight if source.is_packed(names[f"{name}.weight"]) else matrix_of(module, weight)


def apart(found: list[Made]) -> dict[tuple[str, str], float]:
    """‖W_a − W_b‖ / ‖W_a‖ over all matrices, for every pair; all files are read side by side, a matrix at a time."""
    missed, whole = defaultdict[tuple[str, str], float](float), defaultdict[str, float](float)
    for same in zip(*(matrices(one.path) for one in found), strict=True):
        known = {one.name: w for one, w in zip(found, same, strict=True)}
        for name, w in known.items():
            whole[name] += float(w.square().sum(dtype=torch.float64))
        for a, b in combinations(known, 2):
            missed[a, b] += float((known[a] - known[b]).square().sum(dtype=torch.float64))
    return {(a, b): (lost / whole[a]) ** 0.5 for (a, b), lost in missed.items()}


def row(scheme: str, a: Made, b: Made, weights: float) -> list[str]:
    """A pair of models in the table."""
    log_p, log_q = a.logits.log_softmax(-1), b.logits.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    same = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    moved = float((a.logits - b.logits).norm() / a.logits.norm())
    return [scheme, a.name, b.name, f"{weights:.1e}", f"{moved:.1e}", f"{kl:.1e}", f"{same:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--schemes", default=",".join(FORMATS))
    args = parser.parse_args()
    ids = torch.tensor(load_tokenizer(args.model).encode(read_text("stdlib-heldout")[:20_000])[: args.tokens])
    whole = Made("float", args.model, logits(args.model, ids))
    for scheme in args.schemes.split(","):
        with TemporaryDirectory() as folder:
            found = [whole, *made(args.model, scheme, Path(folder), ids)]
            weights = apart(found)
        pairs = ((a, b) for a, b in combinations(found, 2) if a is not whole or b is found[1])
        rows = [row(scheme, a, b, weights[a.name, b.name]) for a, b in pairs]
        print(table(["scheme", "of", "and", "weights apart", "logits apart", "KL", "same token"], rows), flush=True)


if __name__ == "__main__":
    main()
