"""Run an ONNX file beside the module that it was made from: onnxruntime computes it operator by operator, without fusing any.

So both round alike, and what is left are the last digits of floats, and now and then a code that lay midway between two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import FormatError, VerificationError

MOST = 0.05  # relative difference of an output; a wrong operation makes more, a code that went the other way far less
REMEDY = "check=False writes the file all the same; export the parts that are right"


def check_file(content: bytes, given: Mapping[str, Any], expected: Sequence[Tensor], where: str) -> None:
    """VerificationError if the file's outputs for the example differ from `expected`; FormatError if onnxruntime cannot run it.

    Nothing is checked where onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        fed = {x.name: given[x.name].detach().cpu().numpy() for x in session.get_inputs()}
        found = session.run(None, fed)
    except Exception as error:
        message = f"onnxruntime cannot run it: {error}".splitlines()[0]
        raise FormatError(message, where=where, remedy=REMEDY) from error
    for output, a, b in zip(session.get_outputs(), expected, found, strict=True):
        difference = _difference(a, torch.from_numpy(b))
        if difference:
            message = f"onnxruntime computes something else from the file: {difference}"
            raise VerificationError(message, where=f"{where}, output {output.name}", remedy=REMEDY)


def _difference(expected: Tensor, found: Tensor) -> str:
    """How two outputs differ; "" if they do not."""
    if expected.shape != found.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    a, b = expected.detach().cpu().double().flatten(), found.double().flatten()
    size, off = float(a.norm()), float((a - b).norm())
    return "" if off <= MOST * size else f"{off / (size or 1):.2f} of its size off"
