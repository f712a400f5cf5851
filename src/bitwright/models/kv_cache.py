"""Keys and values of attention in 8 bits: what a long context costs in memory, halved.

Engines keep the keys (behind their rotary positions) and values of all tokens seen, and read them all for each new one.
`KvCache` stands in a cache's place while a block runs: it gathers the ranges of both, or hands back what would be read
from a cache of 8 bits, so that `eval` counts what that costs. Files say it as compressed-tensors and vLLM do: a
kv_cache_scheme, and for each attention module one `k_scale` and one `v_scale`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from bitwright.errors import CheckpointError, RecipeError
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import TENSOR, Scheme

SCALES = ("k_scale", "v_scale")
GRIDS = ("int8", "fp8")
KvRounding = tuple[InputQuantization, InputQuantization]  # of keys, of values


class Listener(Protocol):
    """What gathers ranges: see calibration's `Histogram`."""

    def update(self, x: Tensor) -> None:
        """Add what x [..., K] shows."""


@dataclass
class KvCache:
    """In the place of a cache: gathers ranges, or rounds.

    listening  are told of keys and of values
    rounding   what either becomes in the cache
    used       whether an attention module has asked
    """

    listening: tuple[Listener, Listener] | None = None
    rounding: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    used: bool = field(default=False)

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Called by an attention module with its new keys and values [B, H, T, D]; gives what it will attend to."""
        self.used = True
        if self.listening is not None:
            self.listening[0].update(keys)
            self.listening[1].update(values)
        if self.rounding is None:
            return keys, values
        return self.rounding[0](keys), self.rounding[1](values)


def check(scheme: Scheme) -> None:
    """RecipeError for a scheme that no engine keeps keys and values in."""
    if scheme.group != TENSOR or scheme.grid not in GRIDS or scheme.zero != "sym":
        raise RecipeError(f"no engine keeps keys and values in {scheme}", remedy="int8-tensor or fp8-tensor")


def rounding(scheme: Scheme, scales: tuple[Scales, Scales]) -> KvRounding:
    """How keys and values are rounded under scales that calibration fixed."""
    return InputQuantization(scheme, scales[0]), InputQuantization(scheme, scales[1])


def read_rounding(config: dict[str, Any], read: Callable[[str], Tensor | None], where: str) -> KvRounding | None:
    """What a checkpoint's quantization_config and an attention module's tensors say; None: the cache is in float.

    CheckpointError for a scheme that is not computed here, or scales that are missing.
    """
    found = config.get("kv_cache_scheme")
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
    if keys is None or values is None:
        raise CheckpointError("the scales of its keys and values are missing", where=where)
    scheme = Scheme(grid, TENSOR, "sym", "f32")
    return rounding(scheme, (Scales(keys.float().view(1, 1)), Scales(values.float().view(1, 1))))
