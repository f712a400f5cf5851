"""The native extension, if it was built: which instruction set it uses, and whether it can take these tensors.

The extension holds the few loops that are slow as tensor operations: chains of small steps, one column or one group at a
time. Each has a twin in torch beside its caller, which runs where the extension was not built (no compiler at install),
on a GPU, and for schemes that the extension does not know. Both give the same codes.

The environment variable BITWRIGHT_KERNELS forces one: "torch" for none, or an instruction set ("scalar", "avx2",
"avx512"). An instruction set that this CPU or this build lacks is an error, not a silent other choice.
"""

import os
from types import ModuleType

from bitwright.errors import KernelError

VARIABLE = "BITWRIGHT_KERNELS"
TORCH = "torch"


def _load() -> ModuleType | None:
    """The extension with the instruction set that the environment asks for, or the best there is."""
    wanted = os.environ.get(VARIABLE)
    if wanted == TORCH:
        return None
    try:
        from bitwright import _native
    except ImportError:
        if wanted:
            raise KernelError(f"{VARIABLE}={wanted}, but the native extension was not built", remedy=_BUILD) from None
        return None
    if wanted:
        if wanted not in _native.names():
            known = ", ".join([*_native.names(), TORCH])
            raise KernelError(f"{VARIABLE}={wanted} does not run here", remedy=f"one of {known}")
        _native.choose(wanted)
    return _native


_BUILD = "install a C++ compiler, then install bitwright again"
native = _load()


def current() -> str:
    """What computes: the name of an instruction set, or "torch"."""
    return TORCH if native is None else str(native.current())
