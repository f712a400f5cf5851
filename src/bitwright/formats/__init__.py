"""Checkpoint formats: how a QTensor becomes the tensors of a file, and how those are read back. One class for each format.

`FORMATS` are those that are written, `READERS` those that are read from safetensors directories. The reader that verifies a
written file shares no packing code with the writer. Imports: errors, numerics, kernels, files, gguf.
"""

from pathlib import Path

from bitwright.errors import FormatError, one_of
from bitwright.formats.auto_round import AutoRound
from bitwright.formats.awq_writer import AwqWriter
from bitwright.formats.bitsandbytes_writer import BitsAndBytesWriter
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.formats.format import CheckpointReader, Format, Layer
from bitwright.formats.fp8 import FBGEMM, Fp8
from bitwright.formats.gguf import Gguf
from bitwright.formats.gptq import Gptq
from bitwright.formats.modelopt import Modelopt
from bitwright.formats.mxfp4 import Mxfp4
from bitwright.formats.native import Native

_ENGINES, _OWN = (CompressedTensors(), Gptq(), AwqWriter(), BitsAndBytesWriter()), Native()
FORMATS: dict[str, Format] = {f.name: f for f in (*_ENGINES, Gguf(), _OWN)}
READERS: tuple[CheckpointReader, ...] = (*_ENGINES, _OWN, AutoRound(), Fp8(), Fp8(FBGEMM), Mxfp4(), Modelopt())

SCHEMES = {"gguf": "q4_k_m", "awq": "int4-g128-asym", "bitsandbytes": "nf4-g64-dq"}  # where none is asked for
SCHEME, METHOD, ONE_SHOT = "int4-g128", "gptaq", "gptq"  # elsewhere; see docs/log.md for the method


def format_named(name: str) -> Format:
    """The format of this name. FormatError, which suggests the closest name, if there is none."""
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}", remedy=one_of(name, FORMATS))
    return FORMATS[name]


def chosen(
    out: Path, format_name: str | None, scheme: str | None, method: str | None, *, one_shot: bool = False
) -> tuple[str, str, str]:
    """Fill in the defaults: (format, scheme, method). GGUF where OUT ends in .gguf, else compressed-tensors.

    one_shot: statistics come from the float model alone. GPTAQ needs the quantized model's inputs too, so GPTQ is the default.

    FormatError for an unknown format, or if OUT ends in .gguf and the format is another (or the reverse): engines recognize
    GGUF files by this suffix.
    """
    file = out.suffix.lower() == ".gguf"
    name = format_named(format_name or ("gguf" if file else "compressed-tensors")).name
    if file != (name == "gguf"):
        remedy = "name OUT.gguf for --format gguf, and only then"
        raise FormatError(f"OUT is named {out.name!r}, the format is {name}", where=str(out), remedy=remedy)
    return name, scheme or SCHEMES.get(name, SCHEME), method or (ONE_SHOT if one_shot else METHOD)


__all__ = ["FORMATS", "READERS", "CheckpointReader", "Format", "Layer", "chosen", "format_named"]
