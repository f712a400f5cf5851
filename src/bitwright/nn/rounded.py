"""Layers with fake-quantized weights, for quantization-aware training: reading a weight gives its quantized value."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bitwright.nn.fake import FakeWeight
from bitwright.nn.tree import kind
from bitwright.numerics.scheme import Scheme


class Rounded(nn.Module):
    """A layer with fake quantization. fakes: parameter name -> `FakeWeight`.

    The attribute `weight` is the quantized and dequantized weight. The parameter of this name, in the state dict, is the float
    weight that is trained.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        fakes = self.__dict__["_modules"].get("fakes")
        return fakes[name](value) if fakes is not None and name in fakes else value


class RoundedLinear(Rounded, nn.Linear): ...


class RoundedConv1d(Rounded, nn.Conv1d): ...


class RoundedConv2d(Rounded, nn.Conv2d): ...


class RoundedEmbedding(Rounded, nn.Embedding): ...


class RoundedEmbeddingBag(Rounded, nn.EmbeddingBag): ...


class RoundedAttention(Rounded, nn.MultiheadAttention): ...  # fmt: skip


class HeldWeight(Rounded):
    """A weight as a module of its own, for a forward that reads a layer's weight without calling the layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight


class Entered(nn.Module):
    """A layer with the quantization of its input in front, for a layer whose parent module could not be traced.

    All other attributes are the layer's.
    """

    def __init__(self, edge: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.edge, self.layer = edge, layer

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules or "layer" not in modules else getattr(modules["layer"], name)

    def forward(self, input: Tensor) -> Tensor:
        """The layer on the quantized input, contiguous in memory."""
        result: Tensor = self.layer(self.edge(input))
        return result.contiguous()


ROUNDED: dict[type[nn.Module], type[Rounded]] = {
    nn.Linear: RoundedLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: RoundedLinear,
    nn.Conv1d: RoundedConv1d,
    nn.Conv2d: RoundedConv2d,
    nn.Embedding: RoundedEmbedding,
    nn.EmbeddingBag: RoundedEmbeddingBag,
    nn.MultiheadAttention: RoundedAttention,
    HeldWeight: HeldWeight,
}


def round_weights(layer: nn.Module, scheme: Scheme, *, learned: bool) -> None:
    """Turn a layer into its fake-quantized form, in place. f16 scales become float32, as weights may shrink in training."""
    scheme = replace(scheme, scale="f32") if scheme.scale == "f16" else scheme
    names = [name for name, p in layer.named_parameters(recurse=False) if p.ndim > 1]
    fakes = {name: FakeWeight(layer.get_parameter(name), scheme, learned=learned) for name in names}
    layer.__class__ = ROUNDED[kind(layer)]
    layer.add_module("fakes", nn.ModuleDict(fakes))


def rounded_as(layer: nn.Linear, fake: FakeWeight | None) -> nn.Linear:
    """A Linear with this fake quantization of its weight; unchanged if `fake` is None."""
    if fake is not None:
        layer.__class__ = RoundedLinear
        layer.add_module("fakes", nn.ModuleDict({"weight": fake}))
    return layer


def trained(layer: nn.Module, name: str) -> tuple[Tensor, FakeWeight | None]:
    """A layer's float parameter, and its fake quantization, None if it has none."""
    value = layer._parameters[name]
    assert value is not None
    fakes = layer._modules.get("fakes") if isinstance(layer, Rounded) else None
    return value.detach(), fakes[name] if isinstance(fakes, nn.ModuleDict) and name in fakes else None  # type: ignore[return-value]
