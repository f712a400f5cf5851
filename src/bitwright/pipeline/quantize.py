"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import RecipeError
from bitwright.formats import FORMATS, chosen
from bitwright.gguf.architectures import named
from bitwright.gguf.imatrix import is_imatrix
from bitwright.gguf.reader import GgufFile, is_gguf
from bitwright.pipeline.gguf_rows import quantize_gguf
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.gguf_tensors import GgufPlan, plan_gguf
from bitwright.plan.recipe import Recipe
from bitwright.system.progress import Progress

NEEDING_NO_MODEL = ("rtn", "search", "hqq")

if TYPE_CHECKING:
    from bitwright.plan.preflight import Plan


def planned(
    model: Path,
    out: Path,
    *,
    scheme: str | None,
    method: str | None,
    format: str | None,
    pure: bool,
    activations: str | None,
    observer: str,
    kv_cache: str | None,
    recipe: Path | None,
    calib: str,
    samples: int,
    seqlen: int,
    store: Path | None,
    requantize: bool = False,
    tensor_type: Sequence[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`. Raises the InputError of whatever would stop it."""
    check_out(out)
    texts_of(calib)  # checked here, before any work
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache, pure=pure
    )
    if tensor_type or output_tensor_type or token_embedding_type:
        if not FORMATS[format].one_file:
            message = f"types of single tensors are GGUF's, and OUT is {format}"
            raise RecipeError(message, where=str(out), remedy="name OUT.gguf, or give rules in a recipe")
        rules = rules.with_types(tensor_type, output_tensor_type, token_embedding_type, method)
    rules = rules.without_text() if calib == "none" else rules
    if is_gguf(model):
        file, weighted = GgufFile(model), is_imatrix(calib)
        modelless = _needs_no_model(rules, recipe, format, calib)
        unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
        if modelless or unknown:
            return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown, requantize=requantize)
    from bitwright.plan.preflight import preflight

    return preflight(model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize)


def _needs_no_model(rules: Recipe, recipe: Path | None, format: str, calib: str) -> bool:
    """Whether a GGUF file becomes another one tensor by tensor, by rules without patterns on transformers' names."""
    modelless = all(
        rule.method in NEEDING_NO_MODEL and not rule.transforms and not rule.needs_details for rule in rules.active
    )
    return (calib == "none" or is_imatrix(calib)) and format == "gguf" and modelless and not (recipe or rules.kv_cache)


def carried_out(
    plan: "Plan | GgufPlan", out: Path, *, calib: str, seed: int, resume: bool, store: Path | None, progress: Progress
) -> Result:
    """Carry out a plan: `pipeline.run.run`, or `gguf_rows.quantize_gguf` where no model is needed."""
    if isinstance(plan, GgufPlan):
        return quantize_gguf(plan, out, calib=calib, resume=resume, progress=progress)
    from bitwright.pipeline.run import run

    return run(plan, out, calib=calib, seed=seed, resume=resume, store=store, progress=progress)
