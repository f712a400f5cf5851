"""Write reductions as ONNX nodes: sums and norms over dimensions, extremes and where they are, the largest k, and orders."""

import torch
from torch import Tensor

from bitwright.nn.onnx_writes import TWO, Arguments, Made, Write, Writes, as_type, binary, integers, no_form


def _reduce(kind: str) -> Write:
    """A writer of a reduction over some dimensions, or all; truth values are counted."""

    def write(w: Writes, a: Arguments) -> str:
        dim, keep = a.get("dim"), int(bool(a.get("keepdim", False)))
        truths = isinstance(w.example(a["input"]), Tensor) and w.example(a["input"]).dtype == torch.bool
        x = as_type(w, a["input"], torch.int64) if truths else w.value(a["input"])
        axes = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        if not axes:
            return w.op(kind, [x], keepdims=keep)
        if kind == "ReduceSum" or w.opset >= 18:
            return w.op(kind, [x, w.constant(integers(*axes))], keepdims=keep)
        return w.op(kind, [x], axes=list(axes), keepdims=keep)

    return write


def _norm(w: Writes, a: Arguments) -> str:
    """The Euclidean norm over some dimensions."""
    if a.get("p") not in (None, 2, "fro"):
        raise no_form(str(a["input"]), f"a norm of order {a['p']}")
    squares = w.op("Mul", [w.value(a["input"])] * 2)
    w.shapes[squares] = w.shape(a["input"])
    return w.op("Sqrt", [_reduce("ReduceSum")(w, {**a, "input": squares})])


def _normalize(w: Writes, a: Arguments) -> str:
    """x over its norm in one dimension, and over `eps` where that is larger."""
    length = _norm(w, {"input": a["input"], "p": a.get("p"), "dim": a.get("dim", 1), "keepdim": True})
    return w.op("Div", [w.value(a["input"]), w.op("Max", [length, w.value(float(a.get("eps", 1e-12)))])])


def _any(kind: str) -> Write:
    """any and all: whether the largest, or the smallest, of the truth values is 1."""

    def write(w: Writes, a: Arguments) -> str:
        ones = as_type(w, a["input"], torch.bool)
        whole = w.op("Cast", [ones], to=7)
        return w.op("Cast", [_reduce(kind)(w, {**a, "input": whole})], to=9)

    return write


def _moment(*, root: bool) -> Write:
    """var and std; over n − 1 values unless correction, or unbiased, says otherwise."""

    def write(w: Writes, a: Arguments) -> str:
        dim = a.get("dim")
        if isinstance(dim, bool):  # x.var(unbiased)
            a, dim = {**a, "unbiased": dim, "dim": None}, None
        shape = w.shape(a["input"])
        axes = range(len(shape)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        less = a.get("correction", 1 if a.get("unbiased", True) else 0)
        centered = w.op("Sub", [w.value(a["input"]), _reduce("ReduceMean")(w, {**a, "keepdim": True})])
        squares = w.op("Mul", [centered, centered])
        total = _reduce("ReduceSum")(w, {"input": squares, "dim": tuple(axes), "keepdim": a.get("keepdim")})
        sizes = [w.op("Gather", [w.op("Shape", [w.value(a["input"])]), w.constant(integers(int(i)))]) for i in axes]
        count = w.op("Cast", [w.op("ReduceProd", [w.op("Concat", sizes, axis=0)], keepdims=0)], to=1)
        found = w.op("Div", [total, w.op("Sub", [count, w.value(float(less or 0))])])
        return w.op("Sqrt", [found]) if root else found

    return write


def _extreme(kind: str) -> Write:
    """max and min: of all values, of two tensors, or along a dimension, with the places."""

    def write(w: Writes, a: Arguments) -> Made:
        other = a.get("other", a.get("dim"))
        if other is None:
            return w.op(f"Reduce{kind}", [w.value(a["input"])], keepdims=0)
        if isinstance(w.example(other), Tensor):
            return str(binary(kind)(w, {"input": a["input"], "other": other}))
        along = {"input": a["input"], "dim": int(other), "keepdim": a.get("keepdim", False)}
        return str(_reduce(f"Reduce{kind}")(w, along)), _place(f"Arg{kind}")(w, along)

    return write


def _place(kind: str) -> Write:
    """argmax and argmin; without a dimension, in the tensor as one row."""

    def write(w: Writes, a: Arguments) -> str:
        x, dim = w.value(a["input"]), a.get("dim")
        if dim is None:
            if a.get("keepdim"):
                raise no_form(str(a["input"]), f"{kind} of all dimensions, which are kept")
            x = w.op("Reshape", [x, w.constant(integers(-1))])
        return w.op(kind, [x], axis=int(dim or 0), keepdims=int(bool(a.get("keepdim", False))))

    return write


def _largest(w: Writes, a: Arguments) -> Made:
    """topk: values and places; the smallest with largest=False."""
    k, axis, largest = w.sizes((a["k"],)), int(a.get("dim", -1)), int(bool(a.get("largest", True)))
    values, places = w.several("TopK", [w.value(a["input"]), k], 2, axis=axis, largest=largest, sorted=1)
    return values, places


def _sorted(w: Writes, a: Arguments) -> Made:
    """sort: values and places."""
    axis, x = int(a.get("dim", -1)), w.value(a["input"])
    size = w.op("Gather", [w.op("Shape", [x]), w.constant(integers(axis))])
    values, places = w.several("TopK", [x, size], 2, axis=axis, largest=int(bool(a.get("descending", False))), sorted=1)
    return values, places


REDUCED, ALONG = ("input", "dim", "keepdim", "_dtype"), ("input", "dim", "keepdim")
SPREAD: tuple[str, ...] = ("input", "dim", "correction", "keepdim")
REDUCTIONS: dict[str, tuple[tuple[str, ...], Write]] = {
    "mean": (REDUCED, _reduce("ReduceMean")), "sum": (REDUCED, _reduce("ReduceSum")),
    "prod": (REDUCED, _reduce("ReduceProd")), "amax": (ALONG, _reduce("ReduceMax")), "amin": (ALONG, _reduce("ReduceMin")),
    "logsumexp": (ALONG, _reduce("ReduceLogSumExp")),
    "any": (ALONG, _any("ReduceMax")), "all": (ALONG, _any("ReduceMin")),
    "var": (SPREAD, _moment(root=False)), "std": (SPREAD, _moment(root=True)),
    "max": ((*TWO, "keepdim"), _extreme("Max")), "min": ((*TWO, "keepdim"), _extreme("Min")),
    "argmax": (ALONG, _place("ArgMax")), "argmin": (ALONG, _place("ArgMin")),
    "topk": (("input", "k", "dim", "largest", "_sorted"), _largest),
    "sort": (("input", "dim", "descending", "_stable"), _sorted),
    **dict.fromkeys(("norm", "vector_norm"), (("input", "p", "dim", "keepdim", "_dtype"), _norm)),
    "normalize": (("input", "p", "dim", "eps"), _normalize),
}  # fmt: skip
