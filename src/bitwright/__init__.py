"""bitwright: make trained networks smaller and faster by quantization, and prove what it cost."""

from bitwright.api import evaluate, quantize, quantize_tensor
from bitwright.version import __version__

__all__ = ["__version__", "evaluate", "quantize", "quantize_tensor"]
