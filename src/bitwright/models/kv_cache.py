"""8-bit KV cache: calibrates and simulates the quantization of attention's keys (after RoPE) and values.

`KvCache` takes the place of a cache while a block runs. It either records the ranges of keys and values, or quantizes and
dequantizes them, so that `eval` measures the loss. Stored as compressed-tensors and vLLM do: `kv_cache_scheme` in
config.json, and a `k_scale` and a `v_scale` for each attention module.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, InputError, RecipeError
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import TENSOR, Scheme

SCALES = ("k_scale", "v_scale")
GRIDS = ("int8", "fp8")
MODELOPT = "modelopt"  # quant_method
KvRounding = tuple[InputQuantization, InputQuantization]  # of keys, of values


class Listener(Protocol):
    """Records the range of a tensor; implemented by calibration's `Histogram`."""

    def update(self, x: Tensor) -> None:
        """Include the values of x [..., K]."""


@dataclass
class KvCache:
    """Stands in for a transformers Cache during one forward, of layers with attention or with states.

    listening  record keys and values; None: not recorded
    rounding   quantize and dequantize keys and values; None: left in float
    used       whether an attention module has called `update`
    """

    listening: tuple[Listener, Listener] | None = None
    rounding: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    used: bool = field(default=False)

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by an attention module with new keys and values [B, H, T, D]; returns those that it attends to."""
        self.used = True
        if self.listening is not None:
            self.listening[0].update(keys)
            self.listening[1].update(values)
        if self.rounding is None:
            return keys, values
        return self.rounding[0](keys), self.rounding[1](values)

    def get_seq_length(self, *_: object) -> int:
        """Tokens before this forward: none."""
        return 0

    def get_conv_state(self, *_: object, **__: object) -> None:
        """A layer's last inputs of its convolution: none. States are neither recorded nor rounded."""

    def get_recurrent_state(self, *_: object, **__: object) -> None:
        """A layer's state before this forward: none."""

    def update_conv_state(self, inputs: Tensor, *_: object, **__: object) -> Tensor:
        """Called by a layer with a convolution; returns all of its inputs [B, channels, T]."""
        return inputs

    def update_recurrent_state(self, state: Tensor, *_: object, **__: object) -> Tensor:
        """Called by a layer with its state behind the text."""
        return state


def check(scheme: Scheme) -> None:
    """RecipeError for a KV cache scheme that no engine supports: it must be int8 or fp8, symmetric, per tensor."""
    if scheme.group != TENSOR or scheme.grid not in GRIDS or scheme.zero != "sym":
        raise RecipeError(f"no engine keeps keys and values in {scheme}", remedy="int8-tensor or fp8-tensor")


def check_unrounded(config: dict[str, Any] | None, where: object) -> None:
    """InputError where a checkpoint's quantization_config rounds keys and values itself: they are not rounded again."""
    if kv_cache_scheme(config or {}):
        raise InputError("the checkpoint rounds its keys and values already", where=str(where), remedy="leave out --kv")


def rounding(scheme: Scheme, scales: tuple[Scales, Scales]) -> KvRounding:
    """The static quantization of keys and values under calibrated scales."""
    return InputQuantization(scheme, scales[0]), InputQuantization(scheme, scales[1])


def kv_cache_scheme(config: dict[str, Any]) -> Any:
    """What a quantization_config says of keys and values, as compressed-tensors words it; None: they stay in float."""
    said = config.get("quantization") or config  # the former in ModelOpt's own file
    if isinstance(said, dict) and said.get("kv_cache_quant_algo"):
        algorithm = said["kv_cache_quant_algo"]
        return {"num_bits": 8, "type": "float", "dynamic": False} if algorithm == "FP8" else algorithm
    return config.get("kv_cache_scheme")


def read_rounding(config: dict[str, Any], read: Callable[[str], Tensor | None], where: str) -> KvRounding | None:
    """The KV cache quantization of one attention module in a checkpoint; None: the cache is in float.

    config: the quantization_config; read: gives the module's tensor by suffix.

    CheckpointError for a scheme that is not implemented here, or missing scales.
    """
    found = kv_cache_scheme(config)
    if found is None:
        return None
    said = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": TENSOR} | (
        found if type(found) is dict else {}
    )
    grid = f"fp{said['num_bits']}" if said["type"] == "float" else f"int{said['num_bits']}"
    known = type(found) is dict and said["strategy"] == TENSOR and not said.get("dynamic") and said["symmetric"]
    if not known or grid not in GRIDS:
        message = f"keys and values are kept in a way that is not computed here: {found}"
        remedy = (
            "int8 or FP8, symmetric, one fixed scale a layer; or take kv_cache_scheme out of config.json: kept in float"
        )
        raise CheckpointError(message, where=where, remedy=remedy)
    keys, values = (read(name) for name in SCALES)
    if keys is None and values is None and config.get("quant_method") == MODELOPT:
        keys = values = torch.ones(1)  # not exported: cast as they are
    if keys is None or values is None:
        remedy = "get a good copy of the checkpoint; or take kv_cache_scheme out of config.json: kept in float"
        raise CheckpointError("the scales of its keys and values are missing", where=where, remedy=remedy)
    scheme = Scheme(grid, TENSOR, "sym", "f32")
    return rounding(scheme, (Scales(keys.float().view(1, 1)), Scales(values.float().view(1, 1))))
