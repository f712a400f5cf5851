"""What a file format must say of itself: what it can hold, the bytes of one weight, and how to read them back."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.qtensor import QTensor
from bitwright.scheme import Scheme

Spec = tuple[torch.dtype, tuple[int, ...]]
FLOAT_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Layer:
    """One quantized matrix as a format sees it: its module's name, axes, schemes, and whether the module is a Conv1D."""

    name: str
    N: int
    K: int
    scheme: Scheme
    transposed: bool = False
    activations: Scheme | None = None


class Format(Protocol):
    """A way to store QTensors in safetensors files beside a config.json."""

    name: str
    method: str  # quant_method in config.json

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Scheme:
        """The layer's scheme with its scales stored as this format does in a model of that dtype.

        FormatError, with the reason, if the format cannot hold the layer.
        """

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """The tensors that hold one layer: suffix of the module's name -> type and shape."""

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of `layout`, filled."""

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json; `kept` are the linear modules left in float.

        FormatError if one file cannot hold these layers together.
        """

    def activations(self, config: dict[str, Any], name: str) -> Scheme | None:
        """How the engine rounds the inputs of one quantized module; None: not at all."""

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """Read one module's tensors back to a float matrix [N, K], independently of the writer."""
