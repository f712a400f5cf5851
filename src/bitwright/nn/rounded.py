"""Layers whose weights are rounded wherever they are read, while the parameters stay what an optimizer trains."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bitwright.nn.fake import FakeWeight
from bitwright.nn.tree import kind
from bitwright.numerics.scheme import Scheme


class Rounded(nn.Module):
    """A layer with fake quantization. fakes: of each rounded parameter, by name.

    An attribute such as `weight` is what its codes stand for; the parameter itself, of that name in the state dict, is
    what is trained.
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
    """A weight that is read without calling the layer that holds it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight


class Entered(nn.Module):
    """A single layer and the step of its input into codes, where the module around it is no graph.

    Its other attributes are the layer's.
    """

    def __init__(self, edge: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.edge, self.layer = edge, layer

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules or "layer" not in modules else getattr(modules["layer"], name)

    def forward(self, input: Tensor) -> Tensor:
        """What the layer makes of the codes."""
        return self.layer(self.edge(input))


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
    """Let a layer round its matrices from now on. Scales are in float32: weights in training may shrink."""
    scheme = replace(scheme, scale="f32") if scheme.scale == "f16" else scheme
    names = [name for name, p in layer.named_parameters(recurse=False) if p.ndim > 1]
    fakes = {name: FakeWeight(layer.get_parameter(name), scheme, learned=learned) for name in names}
    layer.__class__ = ROUNDED[kind(layer)]
    layer.add_module("fakes", nn.ModuleDict(fakes))


def rounded_as(layer: nn.Linear, fake: FakeWeight | None) -> nn.Linear:
    """A Linear whose weight is rounded in this way."""
    if fake is not None:
        layer.__class__ = RoundedLinear
        layer.add_module("fakes", nn.ModuleDict({"weight": fake}))
    return layer


def trained(layer: nn.Module, name: str) -> tuple[Tensor, FakeWeight | None]:
    """A parameter as an optimizer sees it, and how it is rounded."""
    value = layer._parameters[name]
    assert value is not None
    fakes = layer._modules.get("fakes") if isinstance(layer, Rounded) else None
    return value.detach(), fakes[name] if isinstance(fakes, nn.ModuleDict) and name in fakes else None  # type: ignore[return-value]
