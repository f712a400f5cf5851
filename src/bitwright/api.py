"""The Python API: the command line's functions, one for a single tensor, and those for any module."""

from pathlib import Path
from typing import overload

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.evaluation.evaluate import Evaluation
from bitwright.evaluation.evaluate import evaluate as _evaluate
from bitwright.inference.loading import load
from bitwright.methods import METHODS
from bitwright.nn.convert import convert
from bitwright.nn.dynamic import quantize_dynamic
from bitwright.nn.inventory import layers
from bitwright.nn.onnx_export import export_onnx
from bitwright.nn.prepare import calibrate, prepare
from bitwright.nn.sensitivity import sensitivity
from bitwright.nn.weightonly import quantize_weights
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.quantize import carried_out, planned
from bitwright.pipeline.result import Result
from bitwright.system.progress import Progress
from bitwright.train.adapters import prepare_for_training
from bitwright.train.distill import distill
from bitwright.train.qat import prepare_qat

__all__ = [
    "calibrate", "convert", "distill", "evaluate", "export_onnx", "layers", "load", "prepare",
    "prepare_for_training", "prepare_qat", "quantize",
    "quantize_dynamic", "quantize_tensor", "quantize_weights", "sensitivity",
]  # fmt: skip


def quantize_tensor(w: Tensor, scheme: str, *, method: str = "search", gram: Tensor | None = None) -> QTensor:
    """Quantize one tensor [N, ...]; `bitwright.numerics.codec.decode` gives the float weights back.

    gram [K, K]: XᵀX / T of the inputs, which "gptq" needs and "search" uses. Raises SchemeError or RecipeError.
    """
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}", remedy=f"one of {', '.join(METHODS)}")
    return METHODS[method](w, gram, Scheme.parse(scheme)).q


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    format: str | None = None,
    pure: bool = False,
    activations: str | None = None,
    observer: str = "mse",
    kv_cache: str | None = None,
    recipe: str | Path | None = None,
    calib: str = "general",
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    store: str | Path | None = None,
    requantize: bool = False,
    resume: bool = True,
    progress: Progress = lambda *_: None,
) -> Result:
    """Quantize the checkpoint directory `model` into the new directory (or .gguf file) `out`; see `bitwright quantize --help`.

    Raises an InputError before anything is written, a VerificationError if the result does not read back as meant.
    """
    where = Path(store) if store else None
    plan = planned(
        Path(model),
        Path(out),
        scheme=scheme,
        method=method,
        format=format,
        pure=pure,
        activations=activations,
        observer=observer,
        kv_cache=kv_cache,
        recipe=Path(recipe) if recipe else None,
        calib=calib,
        samples=samples,
        seqlen=seqlen,
        store=where,
        requantize=requantize,
    )
    return carried_out(plan, Path(out), calib=calib, seed=seed, resume=resume, store=where, progress=progress)


@overload
def evaluate(
    model: str | Path,
    *,
    text: str,
    reference: str | Path | None = None,
    seqlen: int = 256,
    tokens: int | None = None,
    predictions: str | Path | None = None,
    engine: str | None = None,
    chat: bool = False,
) -> Evaluation: ...


@overload
def evaluate(
    model: str | Path,
    *,
    text: list[str] | tuple[str, ...],
    reference: str | Path | None = None,
    seqlen: int = 256,
    tokens: int | None = None,
    predictions: str | Path | None = None,
    engine: str | None = None,
    chat: bool = False,
) -> list[Evaluation]: ...


def evaluate(
    model: str | Path,
    *,
    text: str | list[str] | tuple[str, ...],
    reference: str | Path | None = None,
    seqlen: int = 256,
    tokens: int | None = None,
    predictions: str | Path | None = None,
    engine: str | None = None,
    chat: bool = False,
) -> Evaluation | list[Evaluation]:
    """Perplexity of a checkpoint directory on a text and, with a reference, KL and top-1 agreement.

    text: a UTF-8 file or a built-in text by name; of several, in a list, each is judged for itself, in one pass.
    predictions: a directory to keep what the reference predicts in, for other evaluations on the same texts.
    engine: "llama.cpp": round inputs, keys and values as that engine does (GGUF files); None: compute in float.
    chat: the texts are conversations, in the model's chat template; paragraphs in turn, or a .jsonl file of messages.
    """
    found = _evaluate(
        Path(model),
        reference=Path(reference) if reference else None,
        texts=[text] if isinstance(text, str) else text,
        seqlen=seqlen,
        tokens=tokens,
        predictions=Path(predictions) if predictions else None,
        engine=engine,
        chat=chat,
    )
    return found[0] if isinstance(text, str) else found
