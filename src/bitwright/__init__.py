"""bitwright: make trained networks smaller and faster by quantization, and prove what it cost.

The functions are loaded at first use, so that the command line can start, and set up its process, before torch does.
"""

from typing import TYPE_CHECKING, Any

from bitwright.version import __version__

if TYPE_CHECKING:
    from bitwright.api import evaluate, load, quantize, quantize_tensor

__all__ = ["__version__", "evaluate", "load", "quantize", "quantize_tensor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    from bitwright import api

    return getattr(api, name)
