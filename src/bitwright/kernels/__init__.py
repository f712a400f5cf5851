"""The native extension beside its twin in torch: rounding and products.

Each function here takes the place of one in torch that gives the same numbers, where the extension was built and knows the
scheme; see system/native.py for which instruction set computes.
"""

from bitwright.system.native import TORCH, VARIABLE, current, native

__all__ = ["TORCH", "VARIABLE", "current", "native"]
