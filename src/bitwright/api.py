"""The Python API: the command line's functions, one for a single tensor, and functions for any torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from torch import Tensor

from bitwright.advice.advise import CPU_SCHEMES, Advice
from bitwright.advice.advise import advise as _advise
from bitwright.advice.machine import this_machine
from bitwright.advice.model_shape import shape_of
from bitwright.errors import RecipeError, one_of
from bitwright.evaluation.evaluate import Evaluation
from bitwright.evaluation.evaluate import evaluate as _evaluate
from bitwright.inference.loading import load
from bitwright.methods import METHODS
from bitwright.nn.convert import convert
from bitwright.nn.dynamic import quantize_dynamic
from bitwright.nn.inventory import layers
from bitwright.nn.onnx_export import export_onnx
from bitwright.nn.planned_module import plan_module
from bitwright.nn.prepare import calibrate, prepare
from bitwright.nn.pruning import prune
from bitwright.nn.sensitivity import sensitivity
from bitwright.nn.weightonly import quantize_weights
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.options import QuantizeOptions
from bitwright.pipeline.planned_recipe import PlannedRecipe, Settings
from bitwright.pipeline.planned_recipe import plan_recipe as _plan_recipe
from bitwright.pipeline.quantize import carried_out, planned
from bitwright.pipeline.result import Result
from bitwright.plan.target import Target
from bitwright.plan.tensor_types import TensorTypes
from bitwright.system.device import device_of
from bitwright.system.progress import Progress
from bitwright.train.adapters import prepare_for_training
from bitwright.train.distill import distill
from bitwright.train.qat import prepare_qat

__all__ = [
    "advise", "calibrate", "convert", "distill", "evaluate", "export_onnx", "layers", "load", "plan_module", "plan_recipe",
    "prepare",
    "prepare_for_training", "prepare_qat", "prune", "quantize", "quantize_dynamic", "quantize_tensor", "quantize_weights",
    "sensitivity",
]  # fmt: skip


def quantize_tensor(w: Tensor, scheme: str, *, method: str = "search", gram: Tensor | None = None) -> QTensor:
    """Quantize one tensor w [N, ...]; `bitwright.numerics.codec.decode` gives the float weights back.

    scheme  such as "int4-g128" or "q4_k"; method: such as "search" or "gptq"
    gram    [K, K] = XᵀX / T of the inputs: "search" can use it, calibrated methods such as "gptq" need it
    Raises SchemeError for an unknown scheme, RecipeError for an unknown method or one that lacks a Gram.
    """
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}", remedy=one_of(method, METHODS))
    return METHODS[method](w, gram, Scheme.parse(scheme)).q


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    format: str | None = None,
    pure: bool = False,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    activations: str | None = None,
    observer: str = "mse",
    kv_cache: str | None = None,
    prune: str | None = None,
    recipe: str | Path | None = None,
    size: str | None = None,
    bits: float | None = None,
    calib: str = "general",
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    store: str | Path | None = None,
    requantize: bool = False,
    device: str = "cpu",
    resume: bool = True,
    distributed: bool = False,
    progress: Progress = lambda *_: None,
) -> Result:
    """Quantize the checkpoint `model` (a directory, GGUF file or name on the hub) into a new directory or .gguf file `out`.

    Arguments are the options of `bitwright quantize` (see docs/options.md); samples and seqlen: calibration windows, and
    tokens in one; distributed: with all processes of torch.distributed, each of which makes this call. An InputError (see
    bitwright.errors) is raised before anything is written, a VerificationError if what was written does not read back as meant.
    """
    options = QuantizeOptions(
        scheme=scheme, method=method, format=format, pure=pure, activations=activations, observer=observer,
        types=TensorTypes(tuple(tensor_type), output_tensor_type, token_embedding_type), kv_cache=kv_cache, prune=prune,
        recipe=Path(recipe) if recipe else None, size=size, bits=bits, calib=calib, samples=samples, seqlen=seqlen,
        seed=seed, store=Path(store) if store else None, requantize=requantize, device=device, resume=resume,
        distributed=distributed,
    )  # fmt: skip
    plan = planned(Path(model), Path(out), options, progress=progress)
    return carried_out(plan, Path(out), options, progress=progress)


def plan_recipe(
    model: str | Path,
    *,
    size: str | None = None,
    bits: float | None = None,
    kl: float | None = None,
    settings: Settings | None = None,
    scores: str | Path | None = None,
    progress: Progress = lambda *_: None,
) -> PlannedRecipe:
    """The recipe of least predicted KL whose result takes at most `size` or `bits`; or for a KL, of the fewest bytes.

    size      such as "100MB"; bits: a weight; kl: nats a token. One of the three
    settings  format, candidates, method and calibration; None: `Settings()`
    scores    a directory that keeps the scores, so that another target takes seconds
    Write `text` to a file for `quantize(recipe=...)`. Raises RecipeError for a target that no allocation meets, FormatError for
    schemes that the format cannot hold or that fit no matrix.
    """
    kept = Path(scores) if scores else None
    target = Target.parse(size, bits, kl)
    return _plan_recipe(Path(model), target, settings or Settings(), scores=kept, progress=progress)


def advise(model: str | Path, *, context: int | None = None, engine: str | None = None) -> Advice:
    """What of a model fits this machine, how fast it will be, and which scheme, method, format and engine to take.

    model: a checkpoint directory, a GGUF file, or a config.json; only headers are read. The machine is measured for some
    seconds. Raises InputError for an engine that is unknown or does not run here, or a context beyond the model's.
    """
    shape = shape_of(Path(model))
    return _advise(shape, this_machine(CPU_SCHEMES), model=str(model), context=context, engine=engine)


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
    kv: str | None = None,
    chat: bool = False,
    device: str = "cpu",
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
    kv: str | None = None,
    chat: bool = False,
    device: str = "cpu",
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
    kv: str | None = None,
    chat: bool = False,
    device: str = "cpu",
) -> Evaluation | list[Evaluation]:
    """Perplexity of a checkpoint on a text and, with a reference, KL divergence (nats a token) and top-1 agreement.

    model, reference  checkpoint directories, GGUF files or names on the hub; reference: usually the float original
    text              a UTF-8 file or a built-in text by name; several in a list are judged in one pass, a result for each
    seqlen            tokens in a window, each predicted from its own start; tokens: stop after so many of each text
    predictions       a directory that keeps the reference's predictions, for other evaluations on the same texts
    engine            "llama.cpp": round inputs, keys and values as that engine does (GGUF files); None: compute in float
    kv                keys and values rounded to "q8" or "q4", of the model alone; None: in float
    chat              texts are conversations in the model's chat template: paragraphs in turn, or a data set
    device            that both models are computed on: "cpu", "cuda" or "cuda:N"
    Raises InputError for a window, reference, engine or chat template that does not fit, CalibrationError for too short a text.
    """
    found = _evaluate(
        Path(model),
        reference=Path(reference) if reference else None,
        texts=[text] if isinstance(text, str) else text,
        seqlen=seqlen,
        tokens=tokens,
        predictions=Path(predictions) if predictions else None,
        engine=engine,
        kv=kv,
        chat=chat,
        device=device_of(device),
    )
    return found[0] if isinstance(text, str) else found
