"""Quantization-aware training: fake quantization at the places where post-training static quantization would quantize."""

from collections.abc import Mapping

from torch import nn

from bitwright.nn.batches import Batch, run
from bitwright.nn.dynamic import quantized
from bitwright.nn.integer import integer_weight
from bitwright.nn.prepare import Prepared, prepared_for_training
from bitwright.nn.rounded import ROUNDED, round_weights
from bitwright.nn.tree import kind, named, quantizable, require_mode
from bitwright.nn.weight_schemes import WeightSchemes
from bitwright.numerics.scheme import TOKEN


def prepare_qat(
    module: nn.Module,
    example_inputs: Batch,
    *,
    weights: str = "int8-channel",
    activations: str = "int8-tensor-asym",
    learned: bool = True,
    keep: Mapping[str, str] | None = None,
    schemes: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> Prepared:
    """Insert fake quantization of weights and activations into a module for training, with straight-through gradients.

    Start from a trained float module if there is one. Train with any optimizer and loop, also with autocast or gradient
    checkpointing, then call `.eval()` and `convert`: the integer module's outputs agree with the trained one's within one step
    of the output's scale. Batch norms are folded with their current statistics; dropout stays. LSTM, GRU and attention train
    in float, and `convert` makes them dynamic layers. Other arguments as for `prepare`.

    learned  True: learned scales (LSQ), parameters named `*.learned.exponent`, initialized from example_inputs
             False: scales are computed from the weights, and from moving averages of the activations' minima and maxima;
             below 8 bits this loses more accuracy than training recovers

    Raises as `prepare`, and RecipeError for a module that is not in training mode.
    """
    module = quantizable(module)
    require_mode(module, training=True)
    modes = {name: child.training for name, child in module.named_modules()}
    module.eval()
    try:
        observer = "mse" if learned else "average"
        of_weights = WeightSchemes.of(module, weights, schemes)
        prepared = prepared_for_training(module, example_inputs, of_weights, activations, observer, keep, inplace)
    finally:
        for name, child in module.named_modules():
            child.training = modes.get(name, True)
    _start(prepared, example_inputs, learned=learned)
    prepared.train()
    for name, child in prepared.body.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not modes.get(name, True):
            child.eval()
    return prepared


def _start(prepared: Prepared, example: Batch, *, learned: bool) -> None:
    """Initialize the edges' ranges from one batch, and fake-quantize the weights."""
    edges = prepared.edges()
    for edge in edges:
        edge.phase = "watch"
    run(prepared, example)
    for edge in edges:
        edge.phase = "round" if learned else "follow"
        if learned and edge.scheme.group != TOKEN:
            edge.learn()
    for names, layer in named(prepared.body):
        if kind(layer) not in ROUNDED or any(prepared.kept.covers(name) for name in names):
            continue
        scheme = prepared.weights.at(names[0])
        for p in (p for p in layer.parameters(recurse=False) if p.ndim > 1):
            integer_weight(quantized(p, scheme, names[0]), where=names[0])  # refuse now, not after training
        round_weights(layer, scheme, learned=learned)


def freeze(prepared: Prepared) -> Prepared:
    """Stop updating the ranges of activations, for the last steps of training; fake quantization goes on."""
    for edge in prepared.edges():
        edge.phase = "round"
    return prepared
