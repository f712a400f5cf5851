"""Run an ONNX file beside the module that it was made from: onnxruntime computes it operator by operator, without fusing any.

So both round alike, and what differs are the last digits of floats, and now and then a code that lay midway between two. Many
layers can make much of that. So where outputs differ, every operation is looked at: one whose inputs agree, and whose result
does not, is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bitwright.errors import FormatError, VerificationError
from bitwright.nn.batches import cloned
from bitwright.nn.trace import Recorder

AGREE, DIFFER = 0.002, 0.05  # relative differences up to which values agree, and from which they differ
WRONG = 0.5  # of an output: no rounding makes so much
REMEDY = "check=False writes the file all the same; export the parts that are right"


def check_file(
    model: Any, graph: fx.GraphModule, given: Mapping[str, Any], expected: Sequence[Tensor], where: str, shift: int
) -> None:
    """VerificationError, with its name, for an operation of a file (an onnx.ModelProto) that computes something else.

    graph: what was written; shift: added to int8 codes. FormatError if onnxruntime cannot run the file. Nothing is checked
    where onnxruntime is not installed.
    """
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return
    found = _computed(model, given, where)
    outputs = [output.name for output in model.graph.output]
    off = {name: _difference(a, found[name]) for name, a in zip(outputs, expected, strict=True)}
    if max(off.values(), default=0.0) <= DIFFER:
        return
    worst = max(off, key=lambda name: off[name])
    wrong = _first_wrong(model, graph, given, where, shift) or ((worst, off[worst]) if off[worst] > WRONG else None)
    if wrong is not None:
        name, inside = wrong
        message = f"onnxruntime computes something else from the file: {name} is {inside:.2f} of its size off"
        raise VerificationError(message, where=where, remedy=REMEDY)


def _computed(model: Any, given: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The outputs of a model by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        fed = {x.name: given[x.name].detach().cpu().numpy() for x in session.get_inputs()}
        values = session.run(None, fed)
    except Exception as error:
        message = f"onnxruntime cannot run it: {error}".splitlines()[0]
        raise FormatError(message, where=where, remedy=REMEDY) from error
    return {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values, strict=True)}


@torch.no_grad()
def _first_wrong(
    model: Any, graph: fx.GraphModule, given: Mapping[str, Any], where: str, shift: int
) -> tuple[str, float] | None:
    """The first operation whose inputs agree and whose result differs, and by how much; None if differences only grow."""
    import onnx

    ours, written = Recorder(graph, Tensor.clone), {name for node in model.graph.node for name in node.output}
    holders = graph.graph.find_nodes(op="placeholder")
    ours.run(*cloned(tuple(given.get(str(n.target), next(iter(n.args), None)) for n in holders)))
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    names = [node.name for node in ours.of if node.name in written - known]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    theirs = _computed(whole, given, where)
    off: dict[fx.Node, float] = {}
    for node, value in ours.of.items():
        if node.name in theirs and isinstance(value, Tensor):
            other = theirs[node.name]
            other = other.short() - shift if value.dtype == torch.int8 and other.dtype == torch.uint8 else other
            off[node] = _difference(value, other)
    for node, share in off.items():
        if share > DIFFER and all(off.get(source, 0.0) <= AGREE for source in node.all_input_nodes):
            return node.name, share
    return None


def _difference(expected: Tensor, found: Tensor) -> float:
    """How far two values are apart, relative to the first, codes to their spread; infinite for another shape."""
    if expected.shape != found.shape:
        return float("inf")
    a, b = expected.detach().cpu().double().flatten(), found.double().flatten()
    codes = expected.dtype == torch.int8 and a.numel() > 1
    size, off = float((a - a.mean() if codes else a).norm()), float((a - b).norm())
    return off / size if size else float("inf") if off else 0.0
