"""QTensor <-> files: one class a format, in one table."""

from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.formats.format import Format, Layer
from bitwright.formats.gptq import Gptq
from bitwright.formats.native import Native

FORMATS: dict[str, Format] = {f.name: f for f in (CompressedTensors(), Gptq(), Native())}

__all__ = ["FORMATS", "Format", "Layer"]
