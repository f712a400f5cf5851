"""Whether a change of the code has changed what is quantized: the same tensors, byte by byte, from two states of it.

    python -m bench.same_bytes OTHER_PYTHON

OTHER_PYTHON is the interpreter of an environment in which the other state is installed. Both quantize the built-in model as
the demo does (four schemes, two methods) and once more into a GGUF file by the default method. Exit status 1 if a file differs.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from bench.measure import ROOT, run, table

MODEL = ROOT / "src/bitwright/builtin"
CASES = [
    *((f"{scheme}-{method}", ["--scheme", scheme, "--method", method])
      for scheme in ("int8-channel", "int4-g128", "int3-g128", "int2-g64") for method in ("rtn", "gptq")),
    ("q4_k_m.gguf", ["--scheme", "q4_k_m"]),
]  # fmt: skip
CALIBRATED = ["--calib", "stdlib", "--samples", "64", "--seqlen", "256", "--json"]


def digest(out: Path) -> str:
    """Of a file's bytes; of a directory's tensors by name, in whichever files they lie, and its config."""
    found = hashlib.sha256()
    if out.is_file():
        found.update(out.read_bytes())
        return found.hexdigest()
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode() + t.flatten().view(torch.uint8).numpy().tobytes())
    found.update((out / "config.json").read_bytes())
    return found.hexdigest()


def made(python: str, name: str, how: list[str]) -> str:
    """What one state of the code writes in one case."""
    with TemporaryDirectory(prefix="bitwright-same-") as folder:
        out = Path(folder) / name
        run([python, "-m", "bitwright", "quantize", str(MODEL), str(out), *how, *CALIBRATED], fine=(0, 1))
        return digest(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="an interpreter")
    other = parser.parse_args().other
    found = [(name, made(sys.executable, name, how), made(other, name, how)) for name, how in CASES]
    print(table(["case", "here", "there"], [[name, here[:12], there[:12]] for name, here, there in found]))
    sys.exit(any(here != there for _, here, there in found))


if __name__ == "__main__":
    main()
