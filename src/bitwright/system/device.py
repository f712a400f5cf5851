"""The device that a model is computed on: the CPU, or one CUDA GPU."""

import os
import re
from collections.abc import Mapping

import torch

from bitwright.errors import InputError

CPU = torch.device("cpu")
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None
ONE = 'one device takes the whole model: "cpu", "cuda", "cuda:1" or "auto"'


def device_of(name: str) -> torch.device:
    """A device by its name: cpu, cuda:N, or cuda: the first GPU, and of several processes that torchrun starts on a machine
    each its own. InputError for another name, or a GPU that is not there.
    """
    if name == "cpu":
        return CPU
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise InputError(
            f"unknown device {name!r}", where="device", remedy="cpu, cuda, or cuda:N for the GPU of number N"
        )
    if not torch.cuda.is_available():
        built = torch.backends.cuda.is_built()
        why = "the driver shows no GPU (nvidia-smi lists them)" if built else "this torch was built without CUDA"
        remedy = "leave it out to compute on the CPU" + (
            "" if built else ", or install torch's CUDA build: pytorch.org"
        )
        raise InputError(f"{name!r} asks for a CUDA GPU, and {why}", where="device", remedy=remedy)
    count, own = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    index = int(found[1]) if found[1] else int(own) if own.isdecimal() and int(own) < count else 0
    if index >= count:
        raise InputError(f"no GPU of number {index}", where="device", remedy=f"cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def device_in(device_map: DeviceMap) -> torch.device:
    """The one device of a transformers device_map; None: the CPU; "auto": a GPU where there is one.

    InputError for a map that spreads the model over several devices, and as of `device_of`.
    """
    if isinstance(device_map, Mapping):
        devices = {device_in(device) for device in device_map.values()}
        if len(devices) != 1:
            names = ", ".join(sorted(map(str, devices))) or "none"
            raise InputError(f"a map of the model to {names}", where="device_map", remedy=ONE)
        return devices.pop()
    if device_map is None or device_map == "auto":
        return device_of("cuda") if device_map is not None and torch.cuda.is_available() else CPU
    if device_map in ("balanced", "balanced_low_0", "sequential"):
        raise InputError(f"{device_map!r} spreads a model over several devices", where="device_map", remedy=ONE)
    return device_of(f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map))


def best_dtype(device: torch.device = CPU) -> torch.dtype:
    """The dtype for calibration: bfloat16 on a GPU, or where the CPU multiplies it natively; else float32.

    Also float32 where ATEN_CPU_CAPABILITY restricts torch to older instructions.
    """
    held_back = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device != CPU or (fast and not held_back) else torch.float32
