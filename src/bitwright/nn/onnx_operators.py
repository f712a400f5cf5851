"""Write the float operations of a graph as ONNX nodes: functions and methods by name, and torch.nn modules."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from bitwright.errors import FormatError
from bitwright.nn.rearranged import Spread

Arguments = dict[str, Any]


class Writes(Protocol):
    """The interface of `onnx_export.Writer` that operations use."""

    opset: int

    def op(self, kind: str, inputs: list[str], *, name: str = "", domain: str = "", **attributes: Any) -> str: ...
    def constant(self, x: Tensor) -> str: ...
    def value(self, x: Any) -> str: ...
    def sizes(self, x: Any) -> str: ...
    def shape(self, node: Any) -> tuple[int, ...]: ...


def no_form(where: str, what: str) -> FormatError:
    """The error for an operation that has no ONNX form here."""
    remedy = "a module of bitwright.convert or bitwright.quantize_weights, made of static layers"
    return FormatError(f"{what} has no ONNX form here", where=where, remedy=remedy)


def integers(*x: int) -> Tensor:
    """An int64 tensor [n]."""
    return torch.tensor(x, dtype=torch.int64)


# ------------------------------------------------------------------------------------- functions of one value, of several


def plain(kind: str, **attributes: Any) -> "Write":
    """A writer of an ONNX operator that takes the same tensor arguments."""
    return lambda w, a: w.op(kind, [w.value(x) for x in a.values() if x is not None], **attributes)


def _gelu(w: Writes, a: Arguments) -> str:
    x, approximate = w.value(a["input"]), a.get("approximate", "none")
    if w.opset >= 20:
        return w.op("Gelu", [x], approximate=approximate)
    half = w.op("Mul", [x, w.value(0.5)])
    if approximate == "tanh":
        cube = w.op("Mul", [w.op("Mul", [x, x]), x])
        inner = w.op("Mul", [w.op("Add", [x, w.op("Mul", [cube, w.value(0.044715)])]), w.value(math.sqrt(2 / math.pi))])
        bent = w.op("Tanh", [inner])
    else:
        bent = w.op("Erf", [w.op("Mul", [x, w.value(math.sqrt(0.5))])])
    return w.op("Mul", [half, w.op("Add", [bent, w.value(1.0)])])


def _silu(w: Writes, a: Arguments) -> str:
    x = w.value(a["input"])
    return w.op("Mul", [x, w.op("Sigmoid", [x])])


def _mish(w: Writes, a: Arguments) -> str:
    x = w.value(a["input"])
    return w.op("Mul", [x, w.op("Tanh", [w.op("Softplus", [x])])])


def _clip(low: float | None, high: float | None) -> "Write":
    def write(w: Writes, a: Arguments) -> str:
        first, last = a.get("min", a.get("min_val", low)), a.get("max", a.get("max_val", high))
        ends = ["" if end is None else w.value(float(end)) for end in (first, last)]
        return w.op("Clip", [w.value(a["input"]), *ends])

    return write


def _leaky(w: Writes, a: Arguments) -> str:
    return w.op("LeakyRelu", [w.value(a["input"])], alpha=float(a.get("negative_slope", 0.01)))


def _elu(w: Writes, a: Arguments) -> str:
    return w.op("Elu", [w.value(a["input"])], alpha=float(a.get("alpha", 1.0)))


def _rsqrt(w: Writes, a: Arguments) -> str:
    return w.op("Reciprocal", [w.op("Sqrt", [w.value(a["input"])])])


def _softmax(kind: str) -> "Write":
    return lambda w, a: w.op(kind, [w.value(a["input"])], axis=int(a.get("dim", -1)))


def _sum(w: Writes, a: Arguments) -> str:
    """a + alpha · b."""
    left, right = a["input"], a["other"]
    if a.get("alpha", 1) != 1:
        right = w.op("Mul", [w.value(right), w.value(a["alpha"])])
        return w.op("Add", [w.value(left), right])
    return w.op("Add", [w.value(left), w.value(right)])


# ------------------------------------------------------------------------------------------------------------- shapes


def _reshape(w: Writes, a: Arguments) -> str:
    shape = a["shape"]
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return w.op("Reshape", [w.value(a["input"]), w.sizes(tuple(shape))])


def _flatten(w: Writes, a: Arguments) -> str:
    """Flatten dimensions start … end, for sizes that may be dynamic."""
    rank = len(w.shape(a["input"]))
    start, end = a.get("start_dim", 0) % rank, a.get("end_dim", -1) % rank
    x = w.value(a["input"])
    whole = w.op("Shape", [x])
    parts = [w.op("Slice", [whole, w.constant(integers(0)), w.constant(integers(start))])] if start else []
    parts.append(w.constant(integers(-1)))
    if end < rank - 1:
        parts.append(w.op("Slice", [whole, w.constant(integers(end + 1)), w.constant(integers(rank))]))
    return w.op("Reshape", [x, w.op("Concat", parts, axis=0) if len(parts) > 1 else parts[0]])


def _unflatten(w: Writes, a: Arguments) -> str:
    rank = len(w.shape(a["input"]))
    at = a["dim"] % rank
    x = w.value(a["input"])
    whole = w.op("Shape", [x])
    parts = [w.op("Slice", [whole, w.constant(integers(0)), w.constant(integers(at))])] if at else []
    parts.append(w.sizes(tuple(a["sizes"])))
    if at < rank - 1:
        parts.append(w.op("Slice", [whole, w.constant(integers(at + 1)), w.constant(integers(rank))]))
    return w.op("Reshape", [x, w.op("Concat", parts, axis=0) if len(parts) > 1 else parts[0]])


def _permute(w: Writes, a: Arguments) -> str:
    dims = a["dims"]
    dims = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple | list) else dims
    return w.op("Transpose", [w.value(a["input"])], perm=[int(d) % len(dims) for d in dims])


def _transpose(w: Writes, a: Arguments) -> str:
    rank = len(w.shape(a["input"]))
    order = list(range(rank))
    i, j = a.get("dim0", 0) % rank, a.get("dim1", 1) % rank
    order[i], order[j] = order[j], order[i]
    return w.op("Transpose", [w.value(a["input"])], perm=order)


def _squeeze(w: Writes, a: Arguments) -> str:
    dim = a.get("dim")
    shape = w.shape(a["input"])
    axes = [i for i, n in enumerate(shape) if n == 1] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    axes = [axis for axis in axes if shape[axis] == 1]
    return w.op("Squeeze", [w.value(a["input"]), w.constant(integers(*axes))])


def _unsqueeze(w: Writes, a: Arguments) -> str:
    return w.op("Unsqueeze", [w.value(a["input"]), w.constant(integers(a["dim"]))])


def _concat(w: Writes, a: Arguments) -> str:
    return w.op("Concat", [w.value(x) for x in a["tensors"]], axis=int(a.get("dim", 0)))


def _stack(w: Writes, a: Arguments) -> str:
    dim = int(a.get("dim", 0))
    axis = w.constant(integers(dim))
    return w.op("Concat", [w.op("Unsqueeze", [w.value(x), axis]) for x in a["tensors"]], axis=dim)


def _expand(w: Writes, a: Arguments) -> str:
    sizes = a["shape"]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    wanted = tuple(1 if isinstance(size, int) and size == -1 else size for size in sizes)
    return w.op("Expand", [w.value(a["input"]), w.sizes(wanted)])


def _reduce(kind: str) -> "Write":
    def write(w: Writes, a: Arguments) -> str:
        dim, keep = a.get("dim"), int(bool(a.get("keepdim", False)))
        x = w.value(a["input"])
        axes = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        if not axes:
            return w.op(kind, [x], keepdims=keep)
        if kind == "ReduceSum" or w.opset >= 18:
            return w.op(kind, [x, w.constant(integers(*axes))], keepdims=keep)
        return w.op(kind, [x], axes=list(axes), keepdims=keep)

    return write


def _item(w: Writes, a: Arguments) -> str:
    """Indexing x[...] with integers, slices, None and an ellipsis."""
    index = a["index"] if isinstance(a["index"], tuple) else (a["index"],)
    x, rank = w.value(a["input"]), len(w.shape(a["input"]))
    real = sum(each is not None and each is not Ellipsis for each in index)
    axis, gone, new, at = 0, [], [], 0
    for each in index:
        if each is None:
            new.append(at)
            at += 1
        elif each is Ellipsis:
            axis, at = axis + rank - real, at + rank - real
        elif isinstance(each, slice):
            if each != slice(None):
                stop = each.stop if each.stop is not None else (1 << 62)
                ends = [w.sizes((end,)) for end in (each.start or 0, stop)]
                x = w.op("Slice", [x, *ends, w.constant(integers(axis)), w.constant(integers(each.step or 1))])
            axis, at = axis + 1, at + 1
        elif isinstance(each, int):
            end = each + 1 if each != -1 else 1 << 62
            x = w.op("Slice", [x, w.constant(integers(each)), w.constant(integers(end)), w.constant(integers(axis))])
            gone.append(axis)
            axis += 1
        else:
            raise no_form(str(a["input"]), f"an index {each!r}")
    x = w.op("Squeeze", [x, w.constant(integers(*gone))]) if gone else x
    return w.op("Unsqueeze", [x, w.constant(integers(*new))]) if new else x


def _pad(w: Writes, a: Arguments) -> str:
    sides = a["pad"]
    if a.get("mode", "constant") != "constant":
        raise no_form(str(a["input"]), f"padding by {a['mode']}")
    rank = len(w.shape(a["input"]))
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(sides) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = sides[2 * i], sides[2 * i + 1]
    return w.op("Pad", [w.value(a["input"]), w.sizes((*begins, *ends)), w.value(float(a.get("value") or 0.0))])


# ---------------------------------------------------------------------------------------------------- pools and resizing


def pairs(x: Any, n: int) -> list[int]:
    """A size for each of n dimensions, from one number or a tuple."""
    return [int(x)] * n if isinstance(x, int) else [int(each) for each in x]


def _pool(kind: str) -> "Write":
    def write(w: Writes, a: Arguments) -> str:
        n = len(w.shape(a["input"])) - 2
        kernel, padding = pairs(a["kernel_size"], n), pairs(a.get("padding", 0), n)
        more: dict[str, Any] = {"ceil_mode": int(bool(a.get("ceil_mode", False)))}
        if kind == "AveragePool":
            more["count_include_pad"] = int(bool(a.get("count_include_pad", True)))
            if a.get("divisor_override") is not None:
                raise no_form(str(a["input"]), "a mean with a divisor of its own")
        else:
            more["dilations"] = pairs(a.get("dilation", 1), n)
            if a.get("return_indices"):
                raise no_form(str(a["input"]), "a max pool that returns indices")
        strides = kernel if a.get("stride") in (None, []) else pairs(a["stride"], n)
        x = w.value(a["input"])
        return w.op(kind, [x], kernel_shape=kernel, strides=strides, pads=padding * 2, **more)

    return write


def _adaptive(kind: str) -> "Write":
    """A writer of adaptive pooling: to size 1, or to sizes that divide the input's."""

    def write(w: Writes, a: Arguments) -> str:
        shape = w.shape(a["input"])[2:]
        wanted = (
            pairs(a["output_size"], len(shape)) if not isinstance(a["output_size"], tuple | list) else a["output_size"]
        )
        sizes = [have if want is None else want for have, want in zip(shape, wanted, strict=True)]
        x = w.value(a["input"])
        if all(size == 1 for size in sizes):
            return w.op(f"Global{kind}", [x])
        if any(have % want for have, want in zip(shape, sizes, strict=True)):
            raise no_form(str(a["input"]), f"an adaptive pool of {shape} to {tuple(sizes)}")
        kernel = [have // want for have, want in zip(shape, sizes, strict=True)]
        return w.op(kind, [x], kernel_shape=kernel, strides=kernel)

    return write


def _resize(w: Writes, a: Arguments) -> str:
    mode, n = a.get("mode", "nearest"), len(w.shape(a["input"])) - 2
    kinds = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}
    if mode not in kinds or a.get("antialias"):
        raise no_form(str(a["input"]), f"resizing by {mode}")
    aligned = "align_corners" if a.get("align_corners") else "half_pixel" if mode != "nearest" else "asymmetric"
    more: dict[str, Any] = {"mode": kinds[mode], "coordinate_transformation_mode": aligned}
    more |= {"nearest_mode": "floor"} if mode == "nearest" else {}
    more |= {"cubic_coeff_a": -0.75} if mode == "bicubic" else {}
    x, size, factor = w.value(a["input"]), a.get("size"), a.get("scale_factor")
    if size is None:
        each = [factor] * n if isinstance(factor, int | float) else list(factor or ())
        scales = w.constant(torch.tensor([1.0, 1.0, *map(float, each)]))
        return w.op("Resize", [x, "", scales], **more)
    sizes = tuple(size) if isinstance(size, tuple | list) else (size,) * n
    first = w.op("Slice", [w.op("Shape", [x]), w.constant(integers(0)), w.constant(integers(2))])
    return w.op("Resize", [x, "", "", w.op("Concat", [first, w.sizes(sizes)], axis=0)], **more)


def _spread(w: Writes, a: Arguments) -> str:
    """`rearranged.Spread`: zeros inserted between and around the positions of an image."""
    x, rank, stride = w.value(a["input"]), len(w.shape(a["input"])), a["stride"]
    n = len(stride)
    for axis, step in zip(range(rank - n, rank), stride, strict=True):
        if step == 1:
            continue
        x = w.op("Unsqueeze", [x, w.constant(integers(axis + 1))])
        ends = [0] * (2 * rank + 2)
        ends[rank + 1 + axis + 1] = step - 1
        x = w.op("Pad", [x, w.constant(integers(*ends))])
        whole = w.op("Shape", [x])
        parts = [
            w.op("Slice", [whole, w.constant(integers(0)), w.constant(integers(axis))]),
            w.constant(integers(-1)),
            w.op("Slice", [whole, w.constant(integers(axis + 2)), w.constant(integers(rank + 1))]),
        ]
        x = w.op("Reshape", [x, w.op("Concat", parts, axis=0)])
        last = [w.constant(integers(each)) for each in (0, 1 - step, axis)]
        x = w.op("Slice", [x, *last])
    sides = (
        [0] * (rank - n) + a["border"],
        [0] * (rank - n) + [b + more for b, more in zip(a["border"], a["more"], strict=True)],
    )
    return w.op("Pad", [x, w.sizes((*sides[0], *sides[1]))])


# -------------------------------------------------------------------------------------------------------------- norms


def _prelu(w: Writes, a: Arguments) -> str:
    axes = w.constant(integers(*range(1, len(w.shape(a["input"])) - 1)))
    slope = w.value(a["weight"])
    wide = len(w.shape(a["input"])) > 2
    return w.op("PRelu", [w.value(a["input"]), w.op("Unsqueeze", [slope, axes]) if wide else slope])


def _layer_norm(w: Writes, a: Arguments) -> str:
    shape = tuple(a["normalized_shape"])
    weight, bias = a.get("weight"), a.get("bias")
    inputs = [w.value(a["input"]), w.value(torch.ones(shape) if weight is None else weight)]
    inputs += [] if bias is None else [w.value(bias)]
    return w.op("LayerNormalization", inputs, axis=-len(shape), epsilon=float(a.get("eps", 1e-5)))


def _batch_norm(w: Writes, a: Arguments) -> str:
    C = w.shape(a["input"])[1]
    weight, bias = a.get("weight"), a.get("bias")
    parts = [torch.ones(C) if weight is None else weight, torch.zeros(C) if bias is None else bias]
    named = [w.value(x) for x in (a["input"], *parts, a["running_mean"], a["running_var"])]
    return w.op("BatchNormalization", named, epsilon=float(a.get("eps", 1e-5)))


def _group_norm(w: Writes, a: Arguments) -> str:
    """Group norm: each row of [B, groups, -1] is normalized, then scale and offset for each channel."""
    shape, groups = w.shape(a["input"]), int(a["num_groups"])
    x = w.value(a["input"])
    rows = w.op("Reshape", [x, w.constant(integers(0, groups, -1))])
    ones, zeros = w.constant(torch.ones(groups)), w.constant(torch.zeros(groups))
    rows = w.op("InstanceNormalization", [rows, ones, zeros], epsilon=float(a.get("eps", 1e-5)))
    y = w.op("Reshape", [rows, w.op("Shape", [x])])
    axes = w.constant(integers(*range(1, len(shape) - 1)))
    for kind, each in (("Mul", a.get("weight")), ("Add", a.get("bias"))):
        if each is not None:
            y = w.op(kind, [y, w.op("Unsqueeze", [w.value(each), axes]) if len(shape) > 2 else w.value(each)])
    return y


# ----------------------------------------------------------------------------------------------------------- products


def _linear(w: Writes, a: Arguments) -> str:
    y = w.op("MatMul", [w.value(a["input"]), w.op("Transpose", [w.value(a["weight"])], perm=[1, 0])])
    return y if a.get("bias") is None else w.op("Add", [y, w.value(a["bias"])])


def _conv(w: Writes, a: Arguments) -> str:
    n = len(w.shape(a["input"])) - 2
    if isinstance(a.get("padding"), str):
        raise no_form(str(a["input"]), f"padding {a['padding']!r} of a float convolution")
    inputs = [w.value(a[name]) for name in ("input", "weight", "bias") if a.get(name) is not None]
    return w.op(
        "Conv",
        inputs,
        strides=pairs(a.get("stride", 1), n),
        pads=pairs(a.get("padding", 0), n) * 2,
        dilations=pairs(a.get("dilation", 1), n),
        group=int(a.get("groups", 1)),
    )


def _attention(w: Writes, a: Arguments) -> str:
    """scaled_dot_product_attention: softmax(q kᵀ · scale + mask) v."""
    if a.get("is_causal"):
        raise no_form(str(a["query"]), "causal attention without a mask")
    q, k, v = (w.value(a[name]) for name in ("query", "key", "value"))
    rank, E = len(w.shape(a["key"])), w.shape(a["query"])[-1]
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = w.op("MatMul", [q, w.op("Transpose", [k], perm=order)])
    scores = w.op("Mul", [scores, w.value(float(a.get("scale") or E**-0.5))])
    if a.get("attn_mask") is not None:
        scores = w.op("Add", [scores, w.value(a["attn_mask"])])
    return w.op("MatMul", [w.op("Softmax", [scores], axis=-1), v])


Write = Callable[[Writes, Arguments], str]
X = ("input",)
# Function or method name -> (names of its parameters in order, writer). "*": all further arguments.
FUNCTIONS: dict[str, tuple[tuple[str, ...], Write]] = {
    "add": (("input", "other", "alpha"), _sum), "iadd": (("input", "other"), plain("Add")),
    "sub": (("input", "other"), plain("Sub")), "mul": (("input", "other"), plain("Mul")),
    "truediv": (("input", "other"), plain("Div")), "div": (("input", "other"), plain("Div")),
    "pow": (("input", "other"), plain("Pow")), "neg": (X, plain("Neg")), "abs": (X, plain("Abs")),
    "sqrt": (X, plain("Sqrt")), "rsqrt": (X, _rsqrt), "exp": (X, plain("Exp")), "log": (X, plain("Log")),
    "matmul": (("input", "other"), plain("MatMul")), "bmm": (("input", "other"), plain("MatMul")),
    "relu": (("input", "_inplace"), plain("Relu")), "relu6": (("input", "_inplace"), _clip(0.0, 6.0)),
    "sigmoid": (X, plain("Sigmoid")),
    "tanh": (X, plain("Tanh")), "gelu": (("input", "approximate"), _gelu), "silu": (("input", "_inplace"), _silu),
    "mish": (("input", "_inplace"), _mish), "hardswish": (("input", "_inplace"), plain("HardSwish")),
    "hardsigmoid": (("input", "_inplace"), plain("HardSigmoid", alpha=1 / 6)), "softplus": (X, plain("Softplus")),
    "leaky_relu": (("input", "negative_slope", "_inplace"), _leaky), "elu": (("input", "alpha", "_inplace"), _elu),
    "clamp": (("input", "min", "max"), _clip(None, None)),
    "hardtanh": (("input", "min_val", "max_val", "_inplace"), _clip(-1.0, 1.0)),
    "softmax": (("input", "dim"), _softmax("Softmax")), "log_softmax": (("input", "dim"), _softmax("LogSoftmax")),
    "dropout": (("input", "_p", "_training", "_inplace"), plain("Identity")), "contiguous": (X, plain("Identity")),
    "clone": (X, plain("Identity")), "detach": (X, plain("Identity")), "float": (X, plain("Cast", to=1)),
    "view": (("input", "*shape"), _reshape), "reshape": (("input", "*shape"), _reshape),
    "flatten": (("input", "start_dim", "end_dim"), _flatten), "unflatten": (("input", "dim", "sizes"), _unflatten),
    "permute": (("input", "*dims"), _permute), "transpose": (("input", "dim0", "dim1"), _transpose), "t": (X, _transpose),
    "squeeze": (("input", "dim"), _squeeze), "unsqueeze": (("input", "dim"), _unsqueeze),
    "cat": (("tensors", "dim"), _concat), "concat": (("tensors", "dim"), _concat), "stack": (("tensors", "dim"), _stack),
    "expand": (("input", "*shape"), _expand), "mean": (("input", "dim", "keepdim"), _reduce("ReduceMean")),
    "sum": (("input", "dim", "keepdim"), _reduce("ReduceSum")), "amax": (("input", "dim", "keepdim"), _reduce("ReduceMax")),
    "getitem": (("input", "index"), _item), "pad": (("input", "pad", "mode", "value"), _pad),
    "max_pool1d": (("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), _pool("MaxPool")),
    "max_pool2d": (("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), _pool("MaxPool")),
    "avg_pool1d": (("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"), _pool("AveragePool")),
    "avg_pool2d": (("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
                   _pool("AveragePool")),
    "adaptive_avg_pool1d": (("input", "output_size"), _adaptive("AveragePool")),
    "adaptive_avg_pool2d": (("input", "output_size"), _adaptive("AveragePool")),
    "adaptive_avg_pool3d": (("input", "output_size"), _adaptive("AveragePool")),
    "adaptive_max_pool2d": (("input", "output_size"), _adaptive("MaxPool")),
    "interpolate": (
        ("input", "size", "scale_factor", "mode", "align_corners", "_recompute_scale_factor", "antialias"), _resize,
    ),
    "layer_norm": (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    "batch_norm": (("input", "running_mean", "running_var", "weight", "bias", "_training", "_momentum", "eps"), _batch_norm),
    "group_norm": (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    "linear": (("input", "weight", "bias"), _linear), "prelu": (("input", "weight"), _prelu),
    "spread": (("input", "more", "stride", "border"), _spread),
    **{f"conv{n}d": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), _conv) for n in (1, 2, 3)},
    "scaled_dot_product_attention": (("query", "key", "value", "attn_mask", "_dropout_p", "is_causal", "scale"), _attention),
}  # fmt: skip
# torch.nn class -> the function that it computes, and the attributes that are its arguments.
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("contiguous", ())),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")), nn.ReLU: ("relu", ()), nn.ReLU6: ("relu6", ()),
    nn.GELU: ("gelu", ("approximate",)), nn.SiLU: ("silu", ()), nn.Mish: ("mish", ()), nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()), nn.Hardswish: ("hardswish", ()), nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Softplus: ("softplus", ()), nn.LeakyReLU: ("leaky_relu", ("negative_slope",)), nn.ELU: ("elu", ("alpha",)),
    nn.PReLU: ("prelu", ("weight",)), Spread: ("spread", ("stride", "border")),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")), nn.Softmax: ("softmax", ("dim",)),
    nn.LogSoftmax: ("log_softmax", ("dim",)), nn.Upsample: ("interpolate", ("size", "scale_factor", "mode", "align_corners")),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d),
                    ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"))),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d),
                    ("avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"))),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
                    ("adaptive_avg_pool2d", ("output_size",))),
    nn.AdaptiveMaxPool2d: ("adaptive_max_pool2d", ("output_size",)),
    nn.LayerNorm: ("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
                    ("batch_norm", ("running_mean", "running_var", "weight", "bias", "eps"))),
    nn.GroupNorm: ("group_norm", ("num_groups", "weight", "bias", "eps")), nn.Linear: ("linear", ("weight", "bias")),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d),
                    ("conv2d", ("weight", "bias", "stride", "padding", "dilation", "groups"))),
}  # fmt: skip


def arguments_of(node: fx.Node, names: tuple[str, ...]) -> Arguments:
    """The arguments of a call by name; those whose names begin with "_" do not affect the ONNX form."""
    args: list[Any] = list(node.args)
    found: Arguments = {}
    for name in names:
        if name.startswith("*"):
            found[name[1:]], args = tuple(args), []
        elif args:
            found[name] = args.pop(0)
    for name, value in node.kwargs.items():
        known = [each for each in names if each.lstrip("*_") == name]
        if not known and value is not None and not name.startswith("_"):
            raise no_form(node.name, f"{node.target} with {name}={value!r}")
        found |= {known[0].lstrip("*"): value} if known else {}
    if args:
        raise no_form(node.name, f"{node.target} with {len(node.args)} arguments")
    return {name: value for name, value in found.items() if not name.startswith("_")}
