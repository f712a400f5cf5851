"""Write dynamic layers as ONNX nodes: products, attention, LSTM, GRU and RNN.

A product's inputs are rounded per row, as here at run time: x / s, rounded and clamped, times the dequantized weight, times s.
This is computed in float, where sums of codes are exact; ONNX's DynamicQuantizeLinear has one scale for a whole tensor.
LSTM, GRU and RNN are ONNX's operators on dequantized weights. They do not round inputs and states: outputs differ by that.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.nn.attention import IntegerAttention
from bitwright.nn.layers import DynamicProduct
from bitwright.nn.onnx_writes import Made, Writes, arguments_of, integers, no_form, source
from bitwright.nn.recurrent import IntegerRecurrent
from bitwright.numerics.codec import code_range

HEAD = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "_is_causal")


def dynamic_product(w: Writes, node: fx.Node, layer: DynamicProduct) -> None:
    """Write a dynamic Linear or convolution."""
    w.op("Identity", [product(w, source(node), len(w.shape(node.args[0])), layer)], name=node.name)


def product(w: Writes, x: str, rank: int, layer: DynamicProduct) -> str:
    """Write a dynamic product of a value with this rank; the name of the result."""
    if layer.scale.shape[1] > 1:
        raise no_form(layer.where, "a weight in groups")
    window = layer.window
    if window is None:
        codes, step = rounded(w, x, [-1], layer)
        y = w.op("Mul", [w.op("MatMul", [codes, weight(w, layer.codes.T, layer.scale, axis=1)]), step])
        return y if layer.bias is None else w.op("Add", [y, w.constant(layer.bias)])
    single, first = rank == (2 if layer.flat else 3), 1 if layer.flat else 0
    x = w.op("Unsqueeze", [x, w.constant(integers(0))]) if single else x
    axes = list(range(1, 3 if layer.flat else 4))
    codes, step = rounded(w, x, axes, layer)
    left, right, top, bottom = window.padding
    stored = layer.codes.view(len(layer.codes), *window.kernel, -1).permute(0, 3, 1, 2)
    y = w.op(
        "Conv",
        [codes, weight(w, stored[:, :, 0] if layer.flat else stored, layer.scale, axis=0)],
        pads=[left, right] if layer.flat else [top, left, bottom, right],
        strides=window.stride[first:],
        dilations=window.dilation[first:],
        kernel_shape=window.kernel[first:],
        group=window.groups,
    )
    y = w.op("Mul", [y, step])
    y = y if layer.bias is None else w.op("Add", [y, w.constant(layer.bias.view(-1, *[1] * (len(axes) - 1)))])
    return w.op("Squeeze", [y, w.constant(integers(0))]) if single else y


def weight(w: Writes, codes: Tensor, scale: Tensor, *, axis: int) -> str:
    """Write a weight as int8 codes that are dequantized, one scale for each index of an axis."""
    return w.op("DequantizeLinear", [w.constant(codes), w.constant(scale.flatten())], axis=axis)


def rounded(w: Writes, x: str, axes: list[int], layer: DynamicProduct) -> tuple[str, str]:
    """Write the rounding of a product's inputs over these axes: codes less their zero point, as float; and their scale."""
    scheme, (low, high) = layer.activations, code_range(layer.activations)
    one = w.value(1.0)
    if scheme.zero != "asym":
        top = _reduce(w, "ReduceMax", w.op("Abs", [x]), axes)
        step = _not_zero(w, w.op("Div", [top, w.value(scheme.levels.reach or high)]), one)
        codes = w.op("Round", [w.op("Div", [x, step])])
        return w.op("Clip", [codes, w.value(low), w.value(high)]), step
    least = w.op("Min", [_reduce(w, "ReduceMin", x, axes), w.value(0.0)])
    most = w.op("Max", [_reduce(w, "ReduceMax", x, axes), w.value(0.0)])
    step = _not_zero(w, w.op("Div", [w.op("Sub", [most, least]), w.value(high - low)]), one)
    zero = w.op("Sub", [w.value(low), w.op("Round", [w.op("Div", [least, step])])])
    zero = w.op("Clip", [zero, w.value(low), w.value(high)])
    codes = w.op("Round", [w.op("Add", [w.op("Div", [x, step]), zero])])
    return w.op("Sub", [w.op("Clip", [codes, w.value(low), w.value(high)]), zero]), step


def _not_zero(w: Writes, step: str, one: str) -> str:
    return w.op("Where", [w.op("Equal", [step, w.value(0.0)]), one, step])


def _reduce(w: Writes, kind: str, x: str, axes: list[int]) -> str:
    if w.opset >= 18:
        return w.op(kind, [x, w.constant(integers(*axes))], keepdims=1)
    return w.op(kind, [x], axes=axes, keepdims=1)


# ------------------------------------------------------------------------------------------------------------ attention


def attention(w: Writes, node: fx.Node, layer: IntegerAttention) -> Made:
    """Write multi-head attention: the names of the output and of the weights, None if these are not wanted."""
    a = arguments_of(node, HEAD)
    single = len(w.shape(a["query"])) == 2
    swap, axis = not single and not layer.batch_first, w.constant(integers(0))
    inputs = [w.value(a[name]) for name in ("query", "key", "value")]
    inputs = [w.op("Unsqueeze", [x, axis]) if single else turned(w, x) if swap else x for x in inputs]
    q, k, v = (
        _heads(w, product(w, x, 3, part), layer.num_heads)
        for x, part in zip(inputs, (layer.q, layer.k, layer.v), strict=True)
    )
    scores = w.op("MatMul", [q, w.op("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = w.op("Div", [scores, w.value(math.sqrt(layer.embed_dim // layer.num_heads))])
    scores = _masked(w, scores, a.get("attn_mask"), heads=layer.num_heads)
    scores = _masked(w, scores, a.get("key_padding_mask"), heads=0)
    weights = w.op("Softmax", [scores], axis=-1)
    y = w.op("Transpose", [w.op("MatMul", [weights, v])], perm=[0, 2, 1, 3])
    y = product(w, w.op("Reshape", [y, w.constant(integers(0, 0, -1))]), 3, layer.out_proj)
    y = w.op("Squeeze", [y, axis]) if single else turned(w, y) if swap else y
    if not a.get("need_weights", True):
        return y, None
    if a.get("average_attn_weights", True):
        many = w.op("Transpose", [weights], perm=[0, 2, 3, 1])
        weights = w.op("Squeeze", [_reduce(w, "ReduceMean", many, [3]), w.constant(integers(3))])
    return y, w.op("Squeeze", [weights, axis]) if single else weights


def turned(w: Writes, x: str) -> str:
    """[T, B, E] -> [B, T, E], and back."""
    return w.op("Transpose", [x], perm=[1, 0, 2])


def _heads(w: Writes, x: str, heads: int) -> str:
    """[B, T, E] -> [B, heads, T, E / heads]."""
    return w.op("Transpose", [w.op("Reshape", [x, w.constant(integers(0, 0, heads, -1))])], perm=[0, 2, 1, 3])


def _masked(w: Writes, scores: str, mask: Any, *, heads: int) -> str:
    """Add a mask to the scores [B, heads, T, S], −∞ where a bool mask is True. heads 0: a mask of keys, [B, S] or [S]."""
    if mask is None:
        return scores
    rank, name = len(w.shape(mask)), w.value(mask)
    if not heads:
        name = w.op("Unsqueeze", [name, w.constant(integers(*((1, 2) if rank == 2 else (0, 1, 2))))])
    elif rank == 3:
        ends = w.op("Slice", [w.op("Shape", [name]), w.constant(integers(1)), w.constant(integers(3))])
        name = w.op("Reshape", [name, w.op("Concat", [w.constant(integers(-1, heads)), ends], axis=0)])
    if w.example(mask).dtype == torch.bool:
        return w.op("Where", [name, w.value(-math.inf), scores])
    return w.op("Add", [scores, name])


# ------------------------------------------------------------------------------------------------------------- recurrent

# Mode -> the ONNX operator, and the order of its gates in torch's.
RECURRENT: dict[str, tuple[str, tuple[int, ...]]] = {
    "LSTM": ("LSTM", (0, 3, 1, 2)), "GRU": ("GRU", (1, 0, 2)), "RNN_TANH": ("RNN", (0,)), "RNN_RELU": ("RNN", (0,)),
}  # fmt: skip


def recurrent(w: Writes, node: fx.Node, layer: IntegerRecurrent) -> Made:
    """Write an LSTM, GRU or RNN of any number of layers: the names of outputs and final states, nested as torch's."""
    a = arguments_of(node, ("input", "hx"))
    single = len(w.shape(a["input"])) == 2
    x, axis, count = w.value(a["input"]), w.constant(integers(1)), 2 if layer.mode == "LSTM" else 1
    x = w.op("Unsqueeze", [x, axis]) if single else turned(w, x) if layer.batch_first else x
    given = a.get("hx")
    first = [""] * count
    if given is not None:
        found = w.parts(given)
        first = [str(name) for name in (found if isinstance(found, tuple) else (found,))]
        first = [w.op("Unsqueeze", [name, axis]) for name in first] if single else first
    last: list[list[str]] = []
    for i in range(layer.num_layers):
        x, ends = _one_layer(w, layer, i, x, first)
        last.append(ends)
    states = [w.op("Concat", list(names), axis=0) for names in zip(*last, strict=True)]
    if single:
        x, *states = (w.op("Squeeze", [name, axis]) for name in (x, *states))
    elif layer.batch_first:
        x = turned(w, x)
    return x, tuple(states) if count == 2 else states[0]


def _one_layer(w: Writes, layer: IntegerRecurrent, i: int, x: str, first: list[str]) -> tuple[str, list[str]]:
    """Write one layer in all directions: outputs [T, B, directions · H], final states [directions, B, H]."""
    kind, order = RECURRENT[layer.mode]
    D, H = layer.directions, layer.hidden_size
    ways = slice(i * D, i * D + D)
    inputs: list[Any] = list(layer.ofinput)[ways]
    states: list[Any] = list(layer.ofstate)[ways]
    biases = [torch.cat([_gates(part.offset(), order) for part in pair]) for pair in zip(inputs, states, strict=True)]
    begins = [
        name and w.op("Slice", [name, *(w.constant(integers(end)) for end in (i * D, i * D + D, 0))]) for name in first
    ]
    weights = [_stacked(w, parts, order) for parts in (inputs, states)]
    more: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    more |= {"activations": ["Relu"] * D} if layer.mode == "RNN_RELU" else {}
    y, *ends = w.several(
        kind,
        [x, *weights, w.constant(torch.stack(biases)), "", *begins],
        1 + len(first),
        hidden_size=H,
        direction="bidirectional" if D == 2 else "forward",
        **more,
    )
    y = w.op("Transpose", [y], perm=[0, 2, 1, 3])  # [T, directions, B, H]
    return w.op("Reshape", [y, w.constant(integers(0, 0, D * H))]), ends


def _stacked(w: Writes, parts: list[Any], order: tuple[int, ...]) -> str:
    """The weights of all directions, [directions, gates · H, K]."""
    if any(part.scale.shape[1] > 1 for part in parts):
        raise no_form(parts[0].where, "a weight in groups")
    codes = torch.cat([_gates(part.codes, order) for part in parts])
    scale = torch.cat([_gates(part.scale, order) for part in parts])
    return w.op(
        "Reshape", [weight(w, codes, scale, axis=0), w.constant(integers(len(parts), -1, codes.shape[1]))]
    )  # fmt: skip


def _gates(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Reorder blocks of rows, one for each gate."""
    blocks = x.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


LAYERS: dict[type, Callable[..., Made]] = {
    DynamicProduct: dynamic_product, IntegerAttention: attention, IntegerRecurrent: recurrent,
}  # fmt: skip
