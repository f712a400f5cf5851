"""Write the float operations of a graph as ONNX nodes: functions and methods by name, and torch.nn modules."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.nn.onnx_reductions import REDUCTIONS
from bitwright.nn.onnx_shapes import SHAPES, padded
from bitwright.nn.onnx_writes import TWO, Arguments, Write, Writes, X, binary, integers, no_form, pairs, plain
from bitwright.nn.rearranged import Planes, Slices, Spread

# ------------------------------------------------------------------------------------- functions of one value, of several


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


def _divided(w: Writes, a: Arguments) -> str:
    """a / b, or rounded down."""
    mode = a.get("rounding_mode")
    if mode not in (None, "floor"):
        raise no_form(str(a["input"]), f"a division rounded by {mode!r}")
    y = binary("Div")(w, a)
    return w.op("Floor", [y]) if mode else y


def _reversed(kind: str) -> Write:
    return lambda w, a: binary(kind)(w, {"input": a["other"], "other": a["input"]})


def _clip(low: float | None, high: float | None) -> Write:
    def write(w: Writes, a: Arguments) -> str:
        first, last = a.get("min", a.get("min_val", low)), a.get("max", a.get("max_val", high))
        x = w.value(a["input"])
        if any(isinstance(w.example(end), Tensor) for end in (first, last)):  # bounds for each value
            for kind, end in (("Max", first), ("Min", last)):
                x = x if end is None else w.op(kind, [x, w.value(end)])
            return x
        return w.op("Clip", [x, *("" if end is None else w.value(float(end)) for end in (first, last))])

    return write


def _threshold(w: Writes, a: Arguments) -> str:
    x = w.value(a["input"])
    above = w.op("Greater", [x, w.value(float(a["threshold"]))])
    return w.op("Where", [above, x, w.value(float(a["value"]))])


def _remainder(w: Writes, a: Arguments) -> str:
    """What is left of a by multiples of b, with the sign of b."""
    whole = w.op("Floor", [binary("Div")(w, a)])
    return w.op("Sub", [w.value(a["input"]), w.op("Mul", [whole, w.value(a["other"])])])


def _truncated(w: Writes, a: Arguments) -> str:
    x = w.value(a["input"])
    return w.op("Mul", [w.op("Sign", [x]), w.op("Floor", [w.op("Abs", [x])])])


def _index_select(w: Writes, a: Arguments) -> str:
    return w.op("Gather", [w.value(a["input"]), w.value(a["index"])], axis=int(a["dim"]))


def _log_sigmoid(w: Writes, a: Arguments) -> str:
    return w.op("Neg", [w.op("Softplus", [w.op("Neg", [w.value(a["input"])])])])


def _sloped(kind: str, name: str, default: float) -> Write:
    """A writer of an activation whose one parameter, alpha in ONNX, is called `name` in torch."""
    return lambda w, a: w.op(kind, [w.value(a["input"])], alpha=float(a.get(name, default)))


def _square(w: Writes, a: Arguments) -> str:
    x = w.value(a["input"])
    return w.op("Mul", [x, x])


def _glu(w: Writes, a: Arguments) -> str:
    """The first half times the sigmoid of the second."""
    first, second = w.several("Split", [w.value(a["input"])], 2, axis=int(a.get("dim", -1)), num_outputs=2)
    return w.op("Mul", [first, w.op("Sigmoid", [second])])


def _rsqrt(w: Writes, a: Arguments) -> str:
    return w.op("Reciprocal", [w.op("Sqrt", [w.value(a["input"])])])


def _softmax(kind: str) -> Write:
    return lambda w, a: w.op(kind, [w.value(a["input"])], axis=int(a.get("dim", -1)))


def _sum(w: Writes, a: Arguments) -> str:
    """a + alpha · b."""
    if a.get("alpha", 1) != 1:
        return w.op("Add", [w.value(a["input"]), w.op("Mul", [w.value(a["other"]), w.value(a["alpha"])])])
    return binary("Add")(w, a)


# ---------------------------------------------------------------------------------------------------- pools and resizing


def _pool(kind: str) -> Write:
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


def _averaged(w: Writes, x: str, rank: int, sizes: list[tuple[int, int]]) -> str:
    """Adaptive average pooling, (size, wanted size) of each dimension: a product with a matrix of means for each."""
    for axis, (have, want) in enumerate(sizes, rank - len(sizes)):
        means = torch.nn.functional.adaptive_avg_pool1d(torch.eye(have), want)  # [have, want]
        order = [i for i in range(rank) if i != axis] + [axis]
        x = w.op("MatMul", [w.op("Transpose", [x], perm=order), w.constant(means)])
        x = w.op("Transpose", [x], perm=[order.index(i) for i in range(rank)])
    return x


def _adaptive(kind: str) -> Write:
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
            if kind == "MaxPool":
                raise no_form(str(a["input"]), f"an adaptive pool of {shape} to {tuple(sizes)}")
            return _averaged(w, x, len(shape) + 2, list(zip(shape, sizes, strict=True)))
        kernel = [have // want for have, want in zip(shape, sizes, strict=True)]
        return w.op(kind, [x], kernel_shape=kernel, strides=kernel)

    return write


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


def _affine(a: Arguments, C: int) -> tuple[Any, Any]:
    """A norm's weight and bias [C], which ONNX wants where torch has none."""
    weight, bias = a.get("weight"), a.get("bias")
    return torch.ones(C) if weight is None else weight, torch.zeros(C) if bias is None else bias


def _batch_norm(w: Writes, a: Arguments) -> str:
    C = w.shape(a["input"])[1]
    if a.get("running_mean") is None:
        raise no_form(str(a["input"]), "a batch norm by each batch's own statistics")
    named = [w.value(x) for x in (a["input"], *_affine(a, C), a["running_mean"], a["running_var"])]
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


def _instance_norm(w: Writes, a: Arguments) -> str:
    """Each channel of each example by its own mean and variance; by running ones it is a batch norm."""
    if a.get("running_mean") is not None and not a.get("use_input_stats", False):
        return _batch_norm(w, a)
    C = w.shape(a["input"])[1]
    inputs = [w.value(x) for x in (a["input"], *_affine(a, C))]
    return w.op("InstanceNormalization", inputs, epsilon=float(a.get("eps", 1e-5)))


# ----------------------------------------------------------------------------------------------------------- products


def _linear(w: Writes, a: Arguments) -> str:
    y = w.op("MatMul", [w.value(a["input"]), w.op("Transpose", [w.value(a["weight"])], perm=[1, 0])])
    return y if a.get("bias") is None else w.op("Add", [y, w.value(a["bias"])])


def _conv(w: Writes, a: Arguments) -> str:
    n, x, mode = len(w.shape(a["input"])) - 2, a["input"], a.get("padding_mode", "zeros")
    dilations, kernel = pairs(a.get("dilation", 1), n), w.shape(a["weight"])[2:]
    before, after = _borders(a.get("padding", 0), dilations, kernel)
    if mode != "zeros":
        sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        x, before, after = padded(w, x, sides, mode), [0] * n, [0] * n
    inputs = [w.value(each) for each in (x, a["weight"], a.get("bias")) if each is not None]
    return w.op(
        "Conv",
        inputs,
        strides=pairs(a.get("stride", 1), n),
        pads=[*before, *after],
        dilations=dilations,
        group=int(a.get("groups", 1)),
    )


def _borders(padding: Any, dilations: list[int], kernel: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """What a convolution adds before and after each dimension; "same" adds the odd one behind."""
    if not isinstance(padding, str):
        each = pairs(padding, len(kernel))
        return each, each
    whole = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilations, kernel, strict=True)]
    before = [total // 2 for total in whole]
    return before, [total - left for total, left in zip(whole, before, strict=True)]


def _softplus(w: Writes, a: Arguments) -> str:
    x, beta = w.value(a["input"]), float(a.get("beta", 1.0))
    if beta == 1.0:
        return w.op("Softplus", [x])
    return w.op("Div", [w.op("Softplus", [w.op("Mul", [x, w.value(beta)])]), w.value(beta)])


def _einsum(w: Writes, a: Arguments) -> str:
    given = a["operands"]
    given = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
    return w.op("Einsum", [w.value(x) for x in given], equation=a["equation"])


def _attention(w: Writes, a: Arguments) -> str:
    """scaled_dot_product_attention: softmax(q kᵀ · scale + mask) v."""
    q, k, v = (w.value(a[name]) for name in ("query", "key", "value"))
    rank, E = len(w.shape(a["key"])), w.shape(a["query"])[-1]
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = w.op("MatMul", [q, w.op("Transpose", [k], perm=order)])
    scores = w.op("Mul", [scores, w.value(float(a.get("scale") or E**-0.5))])
    mask = a.get("attn_mask")
    if a.get("is_causal"):  # −∞ above the diagonal
        last = w.op("Slice", [w.op("Shape", [scores]), w.constant(integers(-2)), w.constant(integers(1 << 62))])
        above = w.op("Trilu", [w.op("Expand", [w.value(-math.inf), last]), w.constant(integers(1)[0])], upper=1)
        scores = w.op("Add", [scores, above])
    elif mask is not None and w.example(mask).dtype == torch.bool:
        scores = w.op("Where", [w.value(mask), scores, w.value(-math.inf)])
    elif mask is not None:
        scores = w.op("Add", [scores, w.value(mask)])
    return w.op("MatMul", [w.op("Softmax", [scores], axis=-1), v])


NORM = ("input", "normalized_shape", "weight", "bias", "eps", "_cudnn_enable")
MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
MEAN_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
PLACE = ("input", "_inplace")
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# Function or method name -> (names of its parameters in order, writer).
FUNCTIONS: dict[str, tuple[tuple[str, ...], Write]] = {
    **SHAPES, **REDUCTIONS,
    "add": (("input", "other", "alpha"), _sum), "iadd": (TWO, binary("Add")),
    **dict.fromkeys(("sub", "subtract", "isub"), (TWO, binary("Sub"))), "rsub": (TWO, _reversed("Sub")),
    **dict.fromkeys(("mul", "multiply", "imul"), (TWO, binary("Mul"))), "pow": (TWO, binary("Pow")),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), (("input", "other", "rounding_mode"), _divided)),
    "maximum": (TWO, binary("Max")), "minimum": (TWO, binary("Min")),
    "neg": (X, plain("Neg")), "abs": (X, plain("Abs")), "sqrt": (X, plain("Sqrt")), "rsqrt": (X, _rsqrt),
    "exp": (X, plain("Exp")), "log": (X, plain("Log")), "sin": (X, plain("Sin")), "cos": (X, plain("Cos")),
    "erf": (X, plain("Erf")), "floor": (X, plain("Floor")), "round": (X, plain("Round")), "square": (X, _square),
    "reciprocal": (X, plain("Reciprocal")), "trunc": (X, _truncated), "remainder": (TWO, _remainder),
    **{name: (X, plain(name.capitalize())) for name in ("tan", "asin", "acos", "atan")},
    **{name: (X, plain(name.capitalize())) for name in ("sinh", "cosh", "asinh", "acosh", "atanh")},
    "log1p": (X, lambda w, a: w.op("Log", [w.op("Add", [w.value(a["input"]), w.value(1.0)])])),
    "expm1": (X, lambda w, a: w.op("Sub", [w.op("Exp", [w.value(a["input"])]), w.value(1.0)])),
    "index_select": (("input", "dim", "index"), _index_select),
    **dict.fromkeys(("matmul", "bmm", "mm"), (TWO, plain("MatMul"))),
    "relu": (PLACE, plain("Relu")), "relu6": (PLACE, _clip(0.0, 6.0)), "sigmoid": (X, plain("Sigmoid")),
    "tanh": (X, plain("Tanh")), "gelu": (("input", "approximate"), _gelu), "silu": (PLACE, _silu), "mish": (PLACE, _mish),
    "hardswish": (PLACE, plain("HardSwish")), "hardsigmoid": (PLACE, plain("HardSigmoid", alpha=1 / 6)),
    "softplus": (("input", "beta", "_threshold"), _softplus),
    "leaky_relu": (("input", "negative_slope", "_inplace"), _sloped("LeakyRelu", "negative_slope", 0.01)),
    "selu": (PLACE, plain("Selu")), "celu": (("input", "alpha", "_inplace"), _sloped("Celu", "alpha", 1.0)),
    "logsigmoid": (X, _log_sigmoid),
    "log_sigmoid": (X, _log_sigmoid),
    **dict.fromkeys(("threshold", "_threshold"), (("input", "threshold", "value", "_inplace"), _threshold)),
    "elu": (("input", "alpha", "_inplace"), _sloped("Elu", "alpha", 1.0)), "glu": (("input", "dim"), _glu),
    **dict.fromkeys(("clamp", "clip"), (("input", "min", "max"), _clip(None, None))),
    "clamp_min": (("input", "min"), _clip(None, None)), "clamp_max": (("input", "max"), _clip(None, None)),
    "hardtanh": (("input", "min_val", "max_val", "_inplace"), _clip(-1.0, 1.0)),
    "softmax": (("input", "dim", "_dtype"), _softmax("Softmax")),
    "log_softmax": (("input", "dim", "_dtype"), _softmax("LogSoftmax")),
    "dropout": (("input", "_p", "_training", "_inplace"), plain("Identity")),
    "feature_dropout": (("input", "_p", "_training"), plain("Identity")),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "alias", "lift_fresh_copy"), (("input", "_memory_format"), plain("Identity")),
    ),
    "float": (X, plain("Cast", to=1)),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), (MAX_POOL, _pool("MaxPool"))),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), (MEAN_POOL, _pool("AveragePool"))),
    **{f"adaptive_avg_pool{n}d": (("input", "output_size"), _adaptive("AveragePool")) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": (("input", "output_size"), _adaptive("MaxPool")) for n in (1, 2, 3)},
    "layer_norm": (NORM, _layer_norm),
    "batch_norm": (("input", "running_mean", "running_var", "weight", "bias", "_training", "_momentum", "eps"), _batch_norm),
    "instance_norm": (
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "_momentum", "eps"), _instance_norm,
    ),
    "group_norm": (("input", "num_groups", "weight", "bias", "eps", "_cudnn_enabled"), _group_norm),
    "einsum": (("equation", "*operands"), _einsum),
    "linear": (("input", "weight", "bias"), _linear), "prelu": (("input", "weight"), _prelu),
    **{f"conv{n}d": (CONV, _conv) for n in (1, 2, 3)},
    "scaled_dot_product_attention": (
        ("query", "key", "value", "attn_mask", "_dropout_p", "is_causal", "scale"), _attention,
    ),
}  # fmt: skip
# torch.nn class -> the function that it computes, and the attributes that are its arguments.
MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("contiguous", ())),
    nn.Flatten: ("flatten", ("start_dim", "end_dim")), nn.ReLU: ("relu", ()), nn.ReLU6: ("relu6", ()),
    nn.GELU: ("gelu", ("approximate",)), nn.SiLU: ("silu", ()), nn.Mish: ("mish", ()), nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()), nn.Hardswish: ("hardswish", ()), nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Softplus: ("softplus", ("beta",)), nn.LeakyReLU: ("leaky_relu", ("negative_slope",)), nn.ELU: ("elu", ("alpha",)),
    nn.SELU: ("selu", ()), nn.CELU: ("celu", ("alpha",)), nn.LogSigmoid: ("logsigmoid", ()),
    nn.Threshold: ("threshold", ("threshold", "value")),
    nn.PReLU: ("prelu", ("weight",)), Spread: ("spread", ("stride", "border")),
    Slices: ("slices", ("border", "depth", "step", "dilation")), Planes: ("planes", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")), nn.Softmax: ("softmax", ("dim",)),
    nn.LogSoftmax: ("log_softmax", ("dim",)), nn.Upsample: ("interpolate", ("size", "scale_factor", "mode", "align_corners")),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
                    ("max_pool2d", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"))),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
                    ("avg_pool2d", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"))),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
                    ("adaptive_avg_pool2d", ("output_size",))),
    nn.PixelShuffle: ("pixel_shuffle", ("upscale_factor",)),
    nn.AdaptiveMaxPool2d: ("adaptive_max_pool2d", ("output_size",)),
    nn.LayerNorm: ("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
                    ("batch_norm", ("running_mean", "running_var", "weight", "bias", "eps"))),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
                    ("instance_norm", ("running_mean", "running_var", "weight", "bias", "eps"))),
    nn.GroupNorm: ("group_norm", ("num_groups", "weight", "bias", "eps")), nn.Linear: ("linear", ("weight", "bias")),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d),
                    ("conv2d", ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode"))),
}  # fmt: skip
