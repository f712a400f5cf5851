"""Write the ATen operators of a torch.export graph whose names or arguments differ from those of torch's functions."""

from typing import Any

import torch

from bitwright.nn.onnx_operators import FUNCTIONS
from bitwright.nn.onnx_writes import TWO, TYPES, Arguments, Write, Writes, X, as_type, binary, integers, no_form, plain


def _cast(w: Writes, a: Arguments) -> str:
    wanted = a.get("dtype")
    found = w.example(a["input"]).dtype
    return w.value(a["input"]) if wanted in (None, found) else w.op("Cast", [w.value(a["input"])], to=TYPES[wanted])


def _as_other(w: Writes, a: Arguments) -> str:
    return as_type(w, a["input"], w.example(a["other"]).dtype)


def _range(w: Writes, a: Arguments) -> str:
    """arange: of one end, or of start, end and step."""
    ends = a["ends"]
    start, end, step = (0, *ends, 1) if len(ends) == 1 else (*ends, 1)[:3]
    dtype = a.get("dtype") or torch.int64
    return w.op("Range", [as_type(w, each, dtype) for each in (start, end, step)])


def _full(value: float | None) -> Write:
    """A writer of a tensor of one value, of given sizes; the type is `dtype`, else that of `input`, else float32."""

    def write(w: Writes, a: Arguments) -> str:
        found = a.get("dtype") or (w.example(a["input"]).dtype if "input" in a else None)
        fill = a["value"] if value is None else value
        whole = isinstance(fill, bool), isinstance(fill, int)
        found = found or (torch.bool if whole[0] else torch.int64 if whole[1] and value is None else torch.float32)
        sizes = w.sizes(tuple(a["sizes"])) if "sizes" in a else w.op("Shape", [w.value(a["input"])])
        return w.op("Expand", [as_type(w, fill, found), sizes])

    return write


def _where(w: Writes, a: Arguments) -> str:
    wanted = torch.result_type(*(w.example(a[name]) for name in ("input", "other")))
    return w.op("Where", [w.value(a["condition"]), *(as_type(w, a[name], wanted) for name in ("input", "other"))])


def _filled(w: Writes, a: Arguments) -> str:
    """x.masked_fill(mask, value)."""
    dtype = w.example(a["input"]).dtype
    return w.op("Where", [w.value(a["mask"]), as_type(w, a["value"], dtype), w.value(a["input"])])


def _logical(kind: str) -> Write:
    """A writer of &, | and ^ of truth values."""

    def write(w: Writes, a: Arguments) -> str:
        if any(w.example(x).dtype != torch.bool for x in a.values()):
            raise no_form(str(a["input"]), f"{kind} of integers")
        return w.op(kind, [w.value(x) for x in a.values()])

    return write


def _compared(kind: str, *, negated: bool = False) -> Write:
    def write(w: Writes, a: Arguments) -> str:
        made = binary(kind)(w, a)
        return w.op("Not", [made]) if negated else made

    return write


def _taken(w: Writes, a: Arguments) -> str:
    """x[i], x[:, i] or x[i, j, ...] with tensors as indices, which are broadcast."""
    found, rank = list(a["indices"]), len(w.shape(a["input"]))
    places = [axis for axis, index in enumerate(found) if index is not None]
    if any(w.example(found[axis]).dtype not in (torch.int64, torch.int32) for axis in places):
        raise no_form(str(a["input"]), "an index of truth values")
    if len(places) == 1:
        return w.op("Gather", [w.value(a["input"]), w.value(found[places[0]])], axis=places[0])
    if places != list(range(len(places))) or len(places) > rank:
        raise no_form(str(a["input"]), "indices that are not in front")
    shape = w.op("Shape", [w.value(found[0])])
    for axis in places[1:]:  # the sizes that the indices have together
        ones = w.op("Expand", [w.constant(integers(1)[0]), shape])
        shape = w.op("Shape", [w.op("Mul", [ones, as_type(w, found[axis], torch.int64)])])
    last = w.constant(integers(-1))
    each = [w.op("Expand", [as_type(w, found[axis], torch.int64), shape]) for axis in places]
    return w.op(
        "GatherND", [w.value(a["input"]), w.op("Concat", [w.op("Unsqueeze", [i, last]) for i in each], axis=-1)]
    )


def _embedding(w: Writes, a: Arguments) -> str:
    return w.op("Gather", [w.value(a["weight"]), w.value(a["indices"])])


def _gather(w: Writes, a: Arguments) -> str:
    return w.op("GatherElements", [w.value(a["input"]), w.value(a["index"])], axis=int(a["dim"]))


def _cumulated(w: Writes, a: Arguments) -> str:
    wanted = a.get("dtype") or w.example(a["input"]).dtype
    wanted = torch.int64 if wanted == torch.bool else wanted
    return w.op("CumSum", [as_type(w, a["input"], wanted), w.constant(integers(a["dim"])[0])])


def _scaled(w: Writes, a: Arguments) -> str:
    """addmm and baddbmm: beta · input + alpha · a b."""
    y = w.op("MatMul", [w.value(a["left"]), w.value(a["right"])])
    y = y if a.get("alpha", 1) == 1 else w.op("Mul", [y, w.value(float(a["alpha"]))])
    beta = a.get("beta", 1)
    if beta == 0:
        return y
    x = w.value(a["input"]) if beta == 1 else w.op("Mul", [w.value(a["input"]), w.value(float(beta))])
    return w.op("Add", [x, y])


def _patches(w: Writes, a: Arguments) -> str:
    """im2col (unfold): the values under each place of a kernel, by a convolution that has one output for each of them."""
    (kh, kw), C = a["kernel"], w.shape(a["input"])[1]
    ones = torch.eye(kh * kw).view(kh * kw, 1, kh, kw).repeat(C, 1, 1, 1)
    (top, left), strides, dilations = a["padding"], list(a["stride"]), list(a["dilation"])
    y = w.op(
        "Conv", [w.value(a["input"]), w.constant(ones)],
        pads=[top, left, top, left], strides=strides, dilations=dilations, group=C,
    )  # fmt: skip
    return w.op("Reshape", [y, w.constant(integers(0, C * kh * kw, -1))])


def _triangle(upper: int) -> Write:
    return lambda w, a: w.op(
        "Trilu", [w.value(a["input"]), w.constant(integers(int(a.get("diagonal", 0)))[0])], upper=upper
    )


def _batch_norm(w: Writes, a: Arguments) -> str:
    return FUNCTIONS["batch_norm"][1](w, a)


def _upsampled(mode: str) -> Write:
    """upsample_*.vec: sizes, or factors of the sizes."""

    def write(w: Writes, a: Arguments) -> str:
        found: dict[str, Any] = {"input": a["input"], "mode": mode, "align_corners": a.get("align_corners")}
        found |= {"size": a["size"]} if a.get("size") is not None else {"scale_factor": a["factors"]}
        return FUNCTIONS["interpolate"][1](w, found)

    return write


LIKE, MEMORY = ("input", "dtype", "_layout", "_device", "_pin_memory", "_memory_format"), "_memory_format"
MADE = ("dtype", "_layout", "_device", "_pin_memory")
ATEN: dict[str, tuple[tuple[str, ...], Write]] = {
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), (TWO, _logical("And"))),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), (TWO, _logical("Or"))),
    **dict.fromkeys(("__xor__", "bitwise_xor", "logical_xor"), (TWO, _logical("Xor"))),
    **dict.fromkeys(("bitwise_not", "logical_not"), (X, _logical("Not"))),
    "eq": (TWO, _compared("Equal")), "ne": (TWO, _compared("Equal", negated=True)), "lt": (TWO, _compared("Less")),
    "le": (TWO, _compared("LessOrEqual")), "gt": (TWO, _compared("Greater")), "ge": (TWO, _compared("GreaterOrEqual")),
    "_to_copy": (("input", *MADE, "_non_blocking", MEMORY), _cast),
    "to": (("input", "dtype", "_non_blocking", "_copy", MEMORY), _cast),
    "type_as": (TWO, _as_other), "_unsafe_view": FUNCTIONS["view"],
    "arange": (("*ends", *MADE), _range),
    "full": (("sizes", "value", *MADE), _full(None)), "full_like": (("input", "value", *MADE, MEMORY), _full(None)),
    "zeros": (("sizes", *MADE), _full(0)), "zeros_like": (LIKE, _full(0)), "new_zeros": (("input", "sizes", *MADE), _full(0)),
    "ones": (("sizes", *MADE), _full(1)), "ones_like": (LIKE, _full(1)), "new_ones": (("input", "sizes", *MADE), _full(1)),
    "new_full": (("input", "sizes", "value", *MADE), _full(None)),
    "where": (("condition", "input", "other"), _where), "masked_fill": (("input", "mask", "value"), _filled),
    "index": (("input", "indices"), _taken),
    "embedding": (("weight", "indices", "_padding_idx", "_scale", "_sparse"), _embedding),
    "gather": (("input", "dim", "index", "_sparse_grad"), _gather), "cumsum": (("input", "dim", "dtype"), _cumulated),
    **dict.fromkeys(("addmm", "baddbmm"), (("input", "left", "right", "beta", "alpha"), _scaled)),
    "im2col": (("input", "kernel", "dilation", "padding", "stride"), _patches),
    "tril": (("input", "diagonal"), _triangle(0)), "triu": (("input", "diagonal"), _triangle(1)),
    "batch_norm": (
        ("input", "weight", "bias", "running_mean", "running_var", "_training", "_momentum", "eps", "_cudnn_enabled"),
        _batch_norm,
    ),
    "linalg_vector_norm": (("input", "p", "dim", "keepdim"), FUNCTIONS["norm"][1]),
    "upsample_nearest2d": (("input", "size", "factors"), _upsampled("nearest")),
    "upsample_nearest1d": (("input", "size", "factors"), _upsampled("nearest")),
    "upsample_bilinear2d": (("input", "size", "align_corners", "factors"), _upsampled("bilinear")),
    "upsample_bicubic2d": (("input", "size", "align_corners", "factors"), _upsampled("bicubic")),
    "upsample_linear1d": (("input", "size", "align_corners", "factors"), _upsampled("linear")),
    "isnan": (X, plain("IsNaN")), "sign": (X, plain("Sign")), "ceil": (X, plain("Ceil")),
}  # fmt: skip
