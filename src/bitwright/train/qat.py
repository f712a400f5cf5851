"""Quantization-aware training: the same places as for post-training quantization, rounding while the module trains."""

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize

from bitwright.nn.dynamic import quantized, require_mode
from bitwright.nn.fake import FakeWeight
from bitwright.nn.integer import integer_weight
from bitwright.nn.plan import has_no_integer_form, role_of
from bitwright.nn.prepare import Batch, Prepared, prepare, run
from bitwright.nn.trace import PRODUCT
from bitwright.numerics.scheme import TOKEN


def prepare_qat(
    module: nn.Module,
    example_inputs: Batch,
    *,
    weights: str = "int8-channel",
    activations: str = "int8-tensor",
    learned: bool = True,
    keep: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> Prepared:
    """The module with its weights and the values between layers rounded in every forward pass, straight through for gradients.

    Begin with the trained float module where there is one. Train it with any optimizer and loop, under autocast or gradient
    checkpointing, then `.eval()` and `convert`: the integer module computes what the trained one does, within a step of the
    output's scale. Batch norms are folded with their statistics as they are; dropout modules stay. LSTM, GRU and attention
    train in float, and `convert` makes them dynamic layers. Other arguments as `prepare`'s.

    learned  True: scales' exponents are parameters (LSQ), named `*.learned.exponent`, that start from what example_inputs show
             False: scales follow the weights, and moving averages of the extremes of what passes by, while training; below
             8 bits that costs more than training wins back

    Raises as `prepare` does, and RecipeError for a module that is not in training mode.
    """
    require_mode(module, training=True)
    modes = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        prepared = prepare(
            module,
            example_inputs,
            weights=weights,
            activations=activations,
            observer="mse" if learned else "average",
            keep=keep,
            inplace=inplace,
        )
    finally:
        for name, child in module.named_modules():
            child.training = modes.get(name, True)
    _start(prepared, example_inputs, learned=learned)
    return prepared.train()


def _start(prepared: Prepared, example: Batch, *, learned: bool) -> None:
    """Let weights be rounded, and the edges start from what one batch shows."""
    edges = prepared.edges()
    for edge in edges:
        edge.phase = "watch"
    run(prepared, example)
    for edge in edges:
        edge.phase = "round" if learned else "follow"
        if learned and edge.scheme.group != TOKEN:
            edge.learn()
    for name, layer in list(prepared.body.named_modules()):
        rounded = isinstance(layer, nn.Embedding) or (role_of(layer) == PRODUCT and not has_no_integer_form(layer))
        if rounded and not prepared.kept.covers(name):
            q = quantized(layer.get_parameter("weight"), prepared.weights, name)
            integer_weight(q, where=name)  # refuse now, not after training
            fake = FakeWeight(layer.get_parameter("weight"), prepared.weights, learned=learned)
            parametrize.register_parametrization(layer, "weight", fake, unsafe=True)


def freeze(prepared: Prepared) -> Prepared:
    """Let the ranges of activations stay as they are from here on, which settles the last steps of a training."""
    for edge in prepared.edges():
        edge.phase = "round"
    return prepared
