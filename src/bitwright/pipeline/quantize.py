"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import InputError, RecipeError
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
from bitwright.plan.target import Target
from bitwright.system.device import device_of
from bitwright.system.progress import Progress

NEEDING_NO_MODEL = ("rtn", "search", "hqq")
NOTE = "scores.json"  # of scores.py, which is not imported here: it knows models

if TYPE_CHECKING:
    import torch

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
    size: str | None = None,
    bits: float | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`; a model that is named as on the hub is downloaded first.

    size, bits: what the result may take; then the schemes are chosen (see planned_recipe.py), with scores kept beside OUT until
    it appears. Raises the InputError of whatever would stop the run.
    """
    check_out(out)
    place = device_of(device)
    texts_of(calib)  # checked here, before any work
    model = local(model)
    format, named_scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    if size is not None or bits is not None:
        _refuse({"--scheme": scheme, "--recipe": recipe, "--pure": pure, "--activations": activations, "--kv-cache": kv_cache,
                 "--store": store, "--requantize": requantize, "--device": device != "cpu"})  # fmt: skip
        from bitwright.pipeline.planned_recipe import Settings, plan_recipe

        settings = Settings(format, method=method, calib=calib, samples=samples, seqlen=seqlen, seed=seed)
        target, scores = Target.parse(size, bits), _scores_beside(out)
        return plan_recipe(model, target, settings, scores=scores, progress=progress).plan
    rules = Recipe.of(recipe, scheme=named_scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache,
                      pure=pure)  # fmt: skip
    rules = rules.without_text() if calib == "none" else rules
    if (by_tensor := _by_tensor(model, rules, recipe, format, calib, place)) is not None:
        return by_tensor
    from bitwright.plan.preflight import preflight

    return preflight(model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize, device=place)


def _by_tensor(
    model: Path, rules: Recipe, recipe: Path | None, format: str, calib: str, place: "torch.device"
) -> GgufPlan | None:
    """The plan for a GGUF file that is quantized tensor by tensor, since no model is needed or known; None for all others.

    InputError for another device than the CPU.
    """
    if not is_gguf(model):
        return None
    file, weighted = GgufFile(model), is_imatrix(calib)
    modelless = _needs_no_model(rules, recipe, format, calib)
    unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
    if not (modelless or unknown):
        return None
    if place.type != "cpu":
        remedy = "leave out --device: rows are rounded on all threads of the CPU"
        raise InputError("a GGUF file that needs no model is made on the CPU", where="device", remedy=remedy)
    return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown)


def _refuse(options: dict[str, object]) -> None:
    """RecipeError for options that are given beside --size or --bits: these choose it, or no plan knows it."""
    others = [name for name, value in options.items() if value]
    if others:
        message = f"--size and --bits choose the schemes by themselves, without {', '.join(others)}"
        remedy = "leave one of them out; bitwright plan has --schemes and --keep"
        raise RecipeError(message, where="--size", remedy=remedy)


def _scores_beside(out: Path) -> Path:
    """Where scores are kept until OUT appears, for a run that is resumed."""
    return out.with_name(f"{out.name}.scores")


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

    done = run(plan, out, calib=calib, seed=seed, resume=resume, store=store, progress=progress)
    if (_scores_beside(out) / NOTE).is_file():
        shutil.rmtree(_scores_beside(out))
    return done
