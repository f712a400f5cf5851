"""Export of converted modules to ONNX: QDQ form for integer layers, MatMulNBits for packed weights.

QDQ: engines fuse DequantizeLinear → operation → QuantizeLinear into integer arithmetic; others compute the same in float.
Activations are uint8, which onnxruntime's x86 kernels need, or int8 for TensorRT. Source: the operator specifications of
ONNX and of com.microsoft. Needs the package onnx (the extra `bitwright[onnx]`).
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import FormatError
from bitwright.files.checkpoint import check_folder_of
from bitwright.nn.batches import Batch, bound, outputs
from bitwright.nn.exported import exported
from bitwright.nn.onnx_check import check_file
from bitwright.nn.onnx_layers import LAYERS, MICROSOFT
from bitwright.nn.onnx_writer import Writer
from bitwright.nn.rearranged import LEAVES
from bitwright.nn.trace import Tracer

if TYPE_CHECKING:
    import onnx

OPSETS = range(17, 22)
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # opset -> the first IR version that has it
# Layers that torch.export would take apart into operations on rows of several examples.
WHOLE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
SHIFT = {"uint8": 128, "int8": 0}  # added to int8 codes in the file


def export_onnx(
    module: nn.Module,
    example_inputs: Batch,
    file: str | Path,
    *,
    activations: str = "uint8",
    dynamic_axes: Mapping[str, Sequence[int]] | None = None,
    opset: int = 21,
    check: bool = True,
) -> Path:
    """Write a module of `convert`, `quantize_dynamic` or `quantize_weights` as an ONNX file.

    example_inputs  a batch of inputs
    activations     "uint8" for onnxruntime on x86, "int8" for TensorRT, with symmetric schemes
    dynamic_axes    input name -> dimensions of variable size; None: the first dimension of every input
    opset           17 to 21
    check           run the file by onnxruntime, if it is installed, and compare it with the module on the example

    A module that torch.fx cannot trace is traced by torch.export, with its quantized layers as single operations.

    Raises FormatError, with its name, for an operation that has no ONNX form here, a module that neither can trace, or
    a dimension of `dynamic_axes` whose size the module fixes; VerificationError, with its name, for an operation of the file
    that computes something else.
    OutputError if the folder of the file does not exist.
    """
    out = _place(file)
    try:
        import onnx
    except ImportError:
        raise FormatError("the package onnx is not installed", remedy="pip install bitwright[onnx]") from None
    if activations not in SHIFT or opset not in OPSETS:
        message = f"activations {activations!r} in opset {opset}"
        raise FormatError(message, remedy='activations "uint8" or "int8", opset 17 to 21')
    given = bound(module, example_inputs)
    if isinstance(given, str):
        raise FormatError(given, where=type(module).__name__, remedy="example_inputs as the module is called with")
    _check_tensors(given, type(module).__name__)
    axes = {name: {axis % x.ndim for axis in (dynamic_axes or {}).get(name, () if dynamic_axes else (0,))}
            for name, x in given.items() if isinstance(x, Tensor) and x.ndim}  # fmt: skip
    writer, axes = _written(module, given, axes, SHIFT[activations], opset, strict=dynamic_axes is not None)
    values = [_value(name, x, axes.get(name, ())) for name, x in writer.inputs]
    results, expected = [], outputs(module, example_inputs)
    for name, x in zip(writer.outputs, expected, strict=True):
        results.append(_value(name, x, range(x.ndim) if dynamic_axes else range(min(1, x.ndim))))
    read = {name for node in writer.nodes for name in node.input}
    stored = [each for each in writer.tensors if each.name in read]
    made = onnx.helper.make_graph(writer.nodes, "bitwright", values, results, stored)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSIONS[opset], producer_name="bitwright")
    onnx.checker.check_model(model)
    if check:
        check_file(model, writer.graph, given, expected, type(module).__name__, SHIFT[activations])
    out.write_bytes(model.SerializeToString())
    return out


def _place(file: object) -> Path:
    """Where the file goes: refused before anything is traced."""
    if not isinstance(file, str | Path):
        remedy = "export_onnx(module, example_inputs, file)"
        raise FormatError(f"a {type(file).__name__} is no name of a file", remedy=remedy)
    check_folder_of(Path(file), "the file")
    return Path(file)


def _check_tensors(given: Mapping[str, Any], where: str) -> None:
    """FormatError for an input that holds several tensors."""
    for name, x in given.items():
        if not isinstance(x, Tensor) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(x)):
            remedy = "wrap the module in one whose forward takes each tensor as an argument of its own"
            message = f"its input {name} is a {type(x).__name__} of tensors; those of an ONNX file are tensors"
            raise FormatError(message, where=where, remedy=remedy)


def _written(
    module: nn.Module, given: Mapping[str, Any], free: dict[str, set[int]], shift: int, opset: int, *, strict: bool
) -> tuple[Writer, dict[str, set[int]]]:
    """Write the graph of torch.fx, which keeps all sizes free; if there is none, or an operation has no form, torch.export's.

    Returns the writer, and the free dimensions of inputs. strict: FormatError if torch.export fixes one of `free`.
    """
    refusals: list[FormatError] = []
    try:
        return Writer(_traced(module, given), given, shift, opset).written(), free
    except FormatError as error:
        refusals.append(error)
    except Exception:  # noqa: BLE001  a trace runs foreign code on values that are not there yet
        pass
    for core in (False, True):  # torch's core operators are more, and slower
        try:
            graph, found = exported(module, given, free, {*LAYERS, *LEAVES, *WHOLE}, core=core)
            writer = Writer(graph, given, shift, opset).written()
            break
        except FormatError as error:
            refusals.append(error)
    else:
        raise refusals[0]
    fixed = next((name for name in free if free[name] - found[name]), None)
    if strict and fixed is not None:
        axes = sorted(free[fixed] - found[fixed])
        remedy = "leave them out of dynamic_axes"
        raise FormatError(f"what the module computes fixes the sizes of dimensions {axes}", where=fixed, remedy=remedy)
    return writer, found


def _traced(module: nn.Module, given: Mapping[str, Any]) -> fx.GraphModule:
    """The graph of torch.fx; for a single layer that has an ONNX form, a graph that calls it."""
    if isinstance(module, fx.GraphModule):
        return module
    if type(module) not in LAYERS:
        return fx.GraphModule(module, Packed().trace(module))
    graph, root = fx.Graph(), nn.Module()
    root.add_module("layer", module)
    named = {name: graph.placeholder(name) if isinstance(x, Tensor) else x for name, x in given.items()}
    order = takewhile(named.__contains__, inspect.signature(module.forward).parameters)
    args = [named.pop(name) for name in order]
    graph.output(graph.call_module("layer", tuple(args), named))
    return fx.GraphModule(root, graph)


class Packed(Tracer):
    """A torch.fx tracer for which layers that have an ONNX form are single operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name)


def _value(name: str, x: Any, free: Collection[int]) -> "onnx.ValueInfoProto":
    import onnx

    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.int64: onnx.TensorProto.INT64,
        torch.bool: onnx.TensorProto.BOOL,
    }
    if not isinstance(x, Tensor) or x.dtype not in kinds:
        raise FormatError("inputs and outputs are to be float32 or int64 tensors, or truth values", where=name)
    axes = {axis % x.ndim for axis in free} if x.ndim else set()
    sizes = [("batch" if i == 0 else f"{name}_{i}") if i in axes else n for i, n in enumerate(x.shape)]
    return onnx.helper.make_tensor_value_info(name, kinds[x.dtype], sizes)
