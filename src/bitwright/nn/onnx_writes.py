"""What the writers of ONNX operations share: the interface of `onnx_writer.Writer`, and how a call's arguments are read."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from bitwright.errors import FormatError

Arguments = dict[str, Any]
# The names of a node's results in the file: one name, or nested tuples of them where the result is a tuple of tensors.
Made = str | None | tuple["Made", ...]


class Writes(Protocol):
    """The interface of `onnx_writer.Writer` that operations use.

    shift   added to int8 codes in the file (128 for uint8)
    shapes  of values that are written and no node of the graph: name -> shape
    """

    opset: int
    shift: int
    shapes: dict[str, tuple[int, ...]]

    def op(self, kind: str, inputs: list[str], *, name: str = "", domain: str = "", **attributes: Any) -> str: ...
    def several(self, kind: str, inputs: list[str], count: int, **attributes: Any) -> list[str]: ...
    def constant(self, x: Tensor) -> str: ...
    def value(self, x: Any) -> str: ...
    def sizes(self, x: Any) -> str: ...
    def shape(self, node: Any) -> tuple[int, ...]: ...
    def example(self, node: Any) -> Any: ...
    def parts(self, x: Any) -> Made: ...
    def decoded(self, codes: str, affine: Tensor) -> str: ...
    def encoded(self, x: str, affine: Tensor, name: str) -> None: ...
    def codes(self, x: Tensor) -> Tensor: ...


Write = Callable[[Writes, Arguments], Any]  # the name of the result, or `Made` of several
X, TWO = ("input",), ("input", "other")
# torch's type -> its number in ONNX (TensorProto.DataType).
TYPES: dict[torch.dtype, int] = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float16: 10,
    torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


def no_form(where: str, what: str) -> FormatError:
    """The error for an operation that has no ONNX form here."""
    remedy = "export the parts that have one, or put an operation of torch.nn.functional in its place"
    return FormatError(f"{what} has no ONNX form here", where=where, remedy=remedy)


def integers(*x: int) -> Tensor:
    """An int64 tensor [n]."""
    return torch.tensor(x, dtype=torch.int64)


def plain(kind: str, **attributes: Any) -> Write:
    """A writer of an ONNX operator that takes the same tensor arguments."""
    return lambda w, a: w.op(kind, [w.value(x) for x in a.values() if x is not None], **attributes)


def binary(kind: str) -> Write:
    """A writer of an operator of two values, which are cast to the type that torch computes in."""

    def write(w: Writes, a: Arguments) -> str:
        left, right = (w.example(a[name]) for name in ("input", "other"))
        wanted = torch.result_type(left, right)
        if kind in ("Div", "Pow") and not wanted.is_floating_point:
            wanted = torch.float32
        return w.op(kind, [as_type(w, a[name], wanted) for name in ("input", "other")])

    return write


def as_type(w: Writes, x: Any, wanted: torch.dtype) -> str:
    """A tensor cast to another type if it has another, or a number as a constant of this type."""
    if isinstance(x, int | float):
        return w.constant(torch.tensor(x, dtype=wanted))
    found = w.example(x)
    if not isinstance(found, Tensor):  # a size
        return w.op("Cast", [w.op("Squeeze", [w.sizes((x,))])], to=TYPES[wanted])
    return w.value(x) if found.dtype == wanted else w.op("Cast", [w.value(x)], to=TYPES[wanted])


def pairs(x: Any, n: int) -> list[int]:
    """A size for each of n dimensions, from one number or a tuple."""
    each = [int(x)] if isinstance(x, int) else [int(size) for size in x]
    return each * n if len(each) == 1 else each


def source(node: fx.Node) -> str:
    """The name of a node's first argument."""
    found = node.args[0] if node.args else None
    if not isinstance(found, fx.Node):
        raise no_form(node.name, "an operation on constants")
    return found.name


def arguments_of(node: fx.Node, names: tuple[str, ...]) -> Arguments:
    """The arguments of a call by name; those whose names begin with "_" do not affect the ONNX form.

    names: of the parameters in order; "*" before one: all further arguments.
    """
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
