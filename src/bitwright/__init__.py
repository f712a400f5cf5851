"""bitwright: make trained networks smaller and faster by quantization, and prove what it cost.

The functions are loaded at first use, so that the command line can start, and set up its process, before torch does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitwright.version import __version__

if TYPE_CHECKING:
    from bitwright.api import (
        advise,
        calibrate,
        convert,
        distill,
        evaluate,
        export_onnx,
        layers,
        load,
        plan_module,
        plan_recipe,
        prepare,
        prepare_for_training,
        prepare_qat,
        prune,
        quantize,
        quantize_dynamic,
        quantize_tensor,
        quantize_weights,
        sensitivity,
    )

__all__ = [
    "__version__", "advise", "calibrate", "convert", "distill", "evaluate", "export_onnx", "layers", "load", "plan_module",
    "plan_recipe", "prepare", "prepare_for_training", "prepare_qat", "prune", "quantize", "quantize_dynamic", "quantize_tensor",
    "quantize_weights", "sensitivity",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("bitwright.train")
    if name not in __all__:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    from bitwright import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "train"])
