"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import InputError
from bitwright.files.hub import local
from bitwright.formats import chosen
from bitwright.gguf.architectures import named
from bitwright.gguf.imatrix import is_imatrix
from bitwright.gguf.reader import GgufFile, is_gguf
from bitwright.pipeline.gguf_rows import quantize_gguf
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.gguf_tensors import GgufPlan, plan_gguf
from bitwright.plan.recipe import Recipe
from bitwright.system.device import device_of
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
    device: str = "cpu",
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`; a model that is named as on the hub is downloaded first.

    Raises the InputError of whatever would stop the run.
    """
    check_out(out)
    place = device_of(device)
    texts_of(calib)  # checked here, before any work
    model = local(model)
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache, pure=pure
    )
    rules = rules.without_text() if calib == "none" else rules
    if is_gguf(model):
        file, weighted = GgufFile(model), is_imatrix(calib)
        modelless = _needs_no_model(rules, recipe, format, calib)
        unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
        if (modelless or unknown) and place.type != "cpu":
            remedy = "leave out --device: rows are rounded on all threads of the CPU"
            raise InputError("a GGUF file that needs no model is made on the CPU", where="device", remedy=remedy)
        if modelless or unknown:
            return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown)
    from bitwright.plan.preflight import preflight

    return preflight(model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize, device=place)


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
