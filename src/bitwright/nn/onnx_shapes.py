"""Write the operations of a graph that move values or change shapes as ONNX nodes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from bitwright.nn.onnx_writes import Arguments, Write, Writes, X, integers, no_form

WRAPS = 19  # the first opset whose Pad goes round


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


def _listed(w: Writes, tensors: Any) -> list[str]:
    """The names of a list of tensors, or of the parts of a split. Empty vectors (an empty cache) are left out, as by torch."""
    if isinstance(tensors, fx.Node):
        return [str(name) for name in w.parts(tensors) or ()]
    return [w.value(x) for x in tensors if w.shape(x) != (0,)] or [w.value(tensors[0])]


def _concat(w: Writes, a: Arguments) -> str:
    names = _listed(w, a["tensors"])
    return names[0] if len(names) == 1 else w.op("Concat", names, axis=int(a.get("dim", 0)))


def _stack(w: Writes, a: Arguments) -> str:
    dim = int(a.get("dim", 0))
    axis = w.constant(integers(dim))
    return w.op("Concat", [w.op("Unsqueeze", [x, axis]) for x in _listed(w, a["tensors"])], axis=dim)


def _expand(w: Writes, a: Arguments) -> str:
    sizes = a["shape"]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    wanted = tuple(1 if isinstance(size, int) and size == -1 else size for size in sizes)
    return w.op("Expand", [w.value(a["input"]), w.sizes(wanted)])


def _repeat(w: Writes, a: Arguments) -> str:
    """x.repeat: new dimensions in front, where there are more numbers than dimensions."""
    times = a["times"]
    times = tuple(times[0]) if len(times) == 1 and isinstance(times[0], tuple | list) else times
    x, new = w.value(a["input"]), len(times) - len(w.shape(a["input"]))
    x = w.op("Unsqueeze", [x, w.constant(integers(*range(new)))]) if new else x
    return w.op("Tile", [x, w.sizes(times)])


def _movedim(w: Writes, a: Arguments) -> str:
    rank = len(w.shape(a["input"]))
    order = torch.empty(*range(rank), device="meta").movedim(a["source"], a["destination"]).shape
    return w.op("Transpose", [w.value(a["input"])], perm=list(order))


def _roll(w: Writes, a: Arguments) -> str:
    """torch.roll over some dimensions: two slices, exchanged."""
    x, rank = w.value(a["input"]), len(w.shape(a["input"]))
    if a.get("dims") in (None, (), []):
        raise no_form(str(a["input"]), "a roll of the flattened tensor")
    dims = (a["dims"],) if isinstance(a["dims"], int) else a["dims"]
    for shift, dim in zip((a["shifts"],) if isinstance(a["shifts"], int) else a["shifts"], dims, strict=True):
        axis, size = dim % rank, w.shape(a["input"])[dim]
        if not isinstance(shift, int) or not size or not shift % size:
            continue
        at = w.constant(integers(-(shift % size)))
        ends = w.constant(integers(axis))
        tail = w.op("Slice", [x, at, w.constant(integers(1 << 62)), ends])
        x = w.op("Concat", [tail, w.op("Slice", [x, w.constant(integers(0)), at, ends])], axis=axis)
    return x


def _flip(w: Writes, a: Arguments) -> str:
    dims = a["dims"][0] if len(a["dims"]) == 1 and isinstance(a["dims"][0], tuple | list) else a["dims"]
    n = len(dims)
    ends = [w.constant(integers(*[end] * n)) for end in (-1, -(1 << 62))]
    return w.op("Slice", [w.value(a["input"]), *ends, w.constant(integers(*dims)), w.constant(integers(*[-1] * n))])


def _slice(w: Writes, a: Arguments) -> str:
    """x[start:end:step] along a dimension."""
    ends = [w.sizes((end,)) for end in (a.get("start") or 0, (1 << 62) if a.get("end") is None else a["end"])]
    axis, step = w.constant(integers(a.get("dim", 0))), w.constant(integers(a.get("step", 1)))
    return w.op("Slice", [w.value(a["input"]), *ends, axis, step])


def _narrow(w: Writes, a: Arguments) -> str:
    begin = w.sizes((a["start"],))
    end = w.op("Add", [begin, w.sizes((a["length"],))])
    return w.op("Slice", [w.value(a["input"]), begin, end, w.constant(integers(a["dim"]))])


def _select(w: Writes, a: Arguments) -> str:
    """x.select(dim, index)."""
    axis = int(a["dim"]) % len(w.shape(a["input"]))
    picked = w.op("Gather", [w.value(a["input"]), w.sizes((a["index"],))], axis=axis)
    return w.op("Squeeze", [picked, w.constant(integers(axis))])


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
    return padded(w, a["input"], a["pad"], a.get("mode", "constant"), float(a.get("value") or 0.0))


def padded(w: Writes, x: Any, sides: Sequence[Any], mode: str, value: float = 0.0) -> str:
    """A tensor with borders; sides: before and after the last dimension, then before and after the one before it, …"""
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode not in kinds or (mode == "circular" and w.opset < WRAPS):
        raise no_form(str(x), f"padding by {mode} (opset {w.opset})")
    rank = len(w.shape(x))
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(sides) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = sides[2 * i], sides[2 * i + 1]
    border = [w.value(value)] if mode == "constant" else []
    return w.op("Pad", [w.value(x), w.sizes((*begins, *ends)), *border], mode=kinds[mode])


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
    all_of_them = isinstance(size, fx.Node) and not isinstance(w.example(size), int)  # x.shape[-2:]
    sizes = tuple(size) if isinstance(size, tuple | list) else (size,) if all_of_them else (size,) * n
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


def _slices(w: Writes, a: Arguments) -> str:
    """`rearranged.Slices`: for each output plane of a Conv3d its input slices, as channels."""
    x, rank = w.value(a["input"]), len(w.shape(a["input"]))
    x = w.op("Unsqueeze", [x, w.constant(integers(0))]) if rank == 4 else x
    back, front = a["border"]
    x = w.op("Pad", [x, w.constant(integers(0, 0, front, 0, 0, 0, 0, back, 0, 0))]) if front or back else x
    reach, axis, step = (a["depth"] - 1) * a["dilation"], w.constant(integers(2)), w.constant(integers(a["step"]))
    taps = []
    for at in range(0, reach + 1, a["dilation"]):
        ends = [w.constant(integers(end)) for end in (at, at - reach if at < reach else 1 << 62)]
        taps.append(w.op("Unsqueeze", [w.op("Slice", [x, *ends, axis, step]), axis]))
    turned = w.op("Transpose", [w.op("Concat", taps, axis=2)], perm=[0, 3, 1, 2, 4, 5])  # [B, D', C, depth, H, W]
    area = w.op("Slice", [w.op("Shape", [x]), w.constant(integers(3)), w.constant(integers(5))])
    channels = w.constant(integers(-1, w.shape(a["input"])[-4] * a["depth"]))
    return w.op("Reshape", [turned, w.op("Concat", [channels, area], axis=0)])


def _planes(w: Writes, a: Arguments) -> str:
    """`rearranged.Planes`: the output planes of a Conv3d, each an image of the batch, as its depth."""
    y, rank, ends = w.value(a["input"]), len(w.shape(a["like"])), [w.constant(integers(end)) for end in (0, 1, 4)]
    batch = ends[1] if rank == 4 else w.op("Slice", [w.op("Shape", [w.value(a["like"])]), *ends[:2]])
    image = w.op("Slice", [w.op("Shape", [y]), *ends[1:]])
    y = w.op("Reshape", [y, w.op("Concat", [batch, w.constant(integers(-1)), image], axis=0)])
    y = w.op("Transpose", [y], perm=[0, 2, 1, 3, 4])
    return w.op("Squeeze", [y, ends[0]]) if rank == 4 else y


def _shuffled(w: Writes, a: Arguments) -> str:
    """Pixel shuffle: channels as blocks of pixels."""
    return w.op("DepthToSpace", [w.value(a["input"])], blocksize=int(a["upscale_factor"]), mode="CRD")


SHAPE, SIDES = ("input", "*shape"), ("input", "*dims")
# Function or method name -> (names of its parameters in order, writer).
SHAPES: dict[str, tuple[tuple[str, ...], Write]] = {
    "view": (SHAPE, _reshape), "reshape": (SHAPE, _reshape), "flatten": (("input", "start_dim", "end_dim"), _flatten),
    "unflatten": (("input", "dim", "sizes"), _unflatten), "permute": (SIDES, _permute), "flip": (SIDES, _flip),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), (("input", "dim0", "dim1"), _transpose)),
    **dict.fromkeys(("t", "numpy_T"), (X, _transpose)), "movedim": (("input", "source", "destination"), _movedim),
    "squeeze": (("input", "dim"), _squeeze), "unsqueeze": (("input", "dim"), _unsqueeze),
    **dict.fromkeys(("cat", "concat"), (("tensors", "dim"), _concat)), "stack": (("tensors", "dim"), _stack),
    "expand": (SHAPE, _expand), "repeat": (("input", "*times"), _repeat), "getitem": (("input", "index"), _item),
    "slice": (("input", "dim", "start", "end", "step"), _slice), "narrow": (("input", "dim", "start", "length"), _narrow),
    "pixel_shuffle": (("input", "upscale_factor"), _shuffled),
    "select": (("input", "dim", "index"), _select), "roll": (("input", "shifts", "dims"), _roll),
    **dict.fromkeys(("pad", "constant_pad_nd"), (("input", "pad", "mode", "value"), _pad)),
    "interpolate": (
        ("input", "size", "scale_factor", "mode", "align_corners", "_recompute_scale_factor", "antialias"), _resize,
    ),
    "spread": (("input", "more", "stride", "border"), _spread), "planes": (("input", "like"), _planes),
    "slices": (("input", "border", "depth", "step", "dilation"), _slices),
}  # fmt: skip
