"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import CheckpointError
from bitwright.formats import chosen
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
    prune: str | None,
    recipe: Path | None,
    calib: str,
    samples: int,
    seqlen: int,
    store: Path | None,
    requantize: bool = False,
    adapter: Path | None = None,
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`; adapter: of LoRA, added to the model's weights before.

    Raises the InputError of whatever would stop it.
    """
    check_out(out)
    texts_of(calib)  # checked here, before any work
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe,
        scheme=scheme,
        method=method,
        activations=activations,
        observer=observer,
        kv_cache=kv_cache,
        pure=pure,
        prune=prune,
    )
    rules = rules.without_text() if calib == "none" else rules
    if is_gguf(model):
        file, weighted = GgufFile(model), is_imatrix(calib)
        modelless = adapter is None and _needs_no_model(rules, recipe, format, calib)
        unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
        if unknown and adapter is not None:
            message = "no adapter can be added to a model of an architecture that is not known here"
            raise CheckpointError(message, where=str(model), remedy="give the checkpoint's directory")
        if modelless or unknown:
            return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown)
    from bitwright.plan.preflight import preflight

    return preflight(model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize, adapter=adapter)


def _needs_no_model(rules: Recipe, recipe: Path | None, format: str, calib: str) -> bool:
    """Whether a GGUF file becomes another one tensor by tensor, by rules without patterns on transformers' names."""
    modelless = all(
        rule.method in NEEDING_NO_MODEL and not (rule.transforms or rule.needs_details or rule.prune)
        for rule in rules.active
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
