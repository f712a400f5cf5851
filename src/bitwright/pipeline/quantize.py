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
    prune: str | None,
    recipe: Path | None,
    calib: str,
    samples: int,
    seqlen: int,
    store: Path | None,
    requantize: bool = False,
    adapter: Path | None = None,
    device: str = "cpu",
    size: str | None = None,
    bits: float | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`; a model that is named as on the hub is downloaded first.

    adapter: of LoRA, added to the weights. size, bits: what the result may take; then planned_recipe.py chooses the schemes,
    with scores kept beside OUT until it appears. Raises the InputError of whatever would stop the run."""
    place, model = _checked(out, calib, device), local(model)
    if size is not None or bits is not None:
        _refuse(
            scheme=scheme, recipe=recipe, pure=pure, activations=activations, kv_cache=kv_cache, prune=prune, store=store,
            requantize=requantize, device=device != "cpu",
        )  # fmt: skip
        target, sizes = Target.parse(size, bits), (samples, seqlen, seed)
        return _for_target(model, out, target, progress, format=format, method=method, calib=calib, sizes=sizes)
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache, pure=pure,
        prune=prune,
    )  # fmt: skip
    rules = rules.without_text() if calib == "none" else rules
    if adapter is None and (plan := _without_model(model, rules, recipe, format, calib)) is not None:
        return _on_cpu(plan, place)
    from bitwright.plan.preflight import preflight

    return preflight(
        model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize, adapter=adapter, device=place
    )


def _checked(out: Path, calib: str, device: str) -> "torch.device":
    """The device; refusals of OUT, text or device come before any work."""
    check_out(out)
    texts_of(calib)
    return device_of(device)


def _for_target(
    model: Path,
    out: Path,
    target: Target,
    progress: Progress,
    *,
    format: str | None,
    method: str | None,
    calib: str,
    sizes: tuple[int, int, int],
) -> "Plan":
    """The plan of least predicted KL for a target. sizes: samples, seqlen, seed."""
    from bitwright.pipeline.planned_recipe import Settings, plan_recipe

    format, _, method = chosen(out, format, None, method)
    samples, seqlen, seed = sizes
    settings = Settings(format, method=method, calib=calib, samples=samples, seqlen=seqlen, seed=seed)
    return plan_recipe(model, target, settings, scores=_scores_beside(out), progress=progress).plan


def _without_model(model: Path, rules: Recipe, recipe: Path | None, format: str, calib: str) -> GgufPlan | None:
    """The plan for a GGUF file of which no model is needed, or none can be built; None for all that is run."""
    if not is_gguf(model):
        return None
    file = GgufFile(model)
    weighted, modelless = is_imatrix(calib), _needs_no_model(rules, recipe, format, calib)
    unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
    if not (modelless or unknown):
        return None
    return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown)


def _on_cpu(plan: GgufPlan, place: "torch.device") -> GgufPlan:
    """The plan itself; InputError for another device than the CPU."""
    if place.type != "cpu":
        remedy = "leave out --device: rows are rounded on all threads of the CPU"
        raise InputError("a GGUF file that needs no model is made on the CPU", where="device", remedy=remedy)
    return plan


def _refuse(**options: object) -> None:
    """RecipeError for options beside --size or --bits that say what these choose, or that no plan knows."""
    others = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
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

    done = run(plan, out, calib=calib, seed=seed, resume=resume, store=store, progress=progress)
    if (_scores_beside(out) / NOTE).is_file():
        shutil.rmtree(_scores_beside(out))
    return done
