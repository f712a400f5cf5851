"""A pretended GPU: tensors on a device of their own, which refuse to be mixed with those of the CPU, as on a real one.

Their numbers lie in ordinary tensors, on which every operation is run. It shows that all tensors of an operation are where they
must be, and that no native code is handed any; not what a GPU's kernels compute.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
# Checkpointing asks it of every device that is there, also in tests that never use this one.
torch.get_device_module("pretended").get_amp_supported_dtype = lambda: [torch.bfloat16]
DEVICE = torch.device("pretended:0")
MOVING = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # indices may be on the CPU


class OnDevice(Tensor):
    """A tensor on the pretended device; inner: its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        found = Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **layout)
        found.inner = inner
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the inner tensors. RuntimeError if its tensors, but for numbers, are on two devices."""
    name = func._schema.name
    if name == "aten::_fused_sdp_choice":
        return 0  # the plain formula: the others are chosen by the kind of device
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = {id(x.inner): x for x in tensors if isinstance(x, OnDevice)}
    checked = tensors[:1] if name in INDEXING else tensors
    if there and name not in MOVING and any(not isinstance(x, OnDevice) and x.ndim for x in checked):
        places = [(type(x).__name__, tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name}: tensors on two devices: {places}")
    plain = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    stays = isinstance(args[0], OnDevice) if name == "aten::copy_" else bool(there)
    asked = plain[1].pop("device", None)
    if asked is not None:
        stays, plain[1]["device"] = torch.device(asked).type == DEVICE.type, torch.device("cpu")

    def wrapped(x: Any) -> Any:
        if not stays or not isinstance(x, Tensor):
            return x
        return there[id(x)] if id(x) in there else OnDevice(x)

    return tree_map(wrapped, func(*plain[0], **plain[1]))


class Pretended(TorchDispatchMode):
    """Within this context tensors can be made on the pretended device: torch.zeros(3, device=DEVICE), x.to(DEVICE)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = (kwargs or {}).get("device")
        if asked is not None and torch.device(asked).type == DEVICE.type:
            return run(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _empty(size: Any, stride: Any, *, dtype: torch.dtype, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(here: Tensor, there: OnDevice, non_blocking: bool = False) -> Tensor:
    there.inner.copy_(here)
    return there


LIBRARY = torch.library.Library("aten", "IMPL")  # torch.tensor(numbers, device=DEVICE) passes modes by
LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
