"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import InputError, RecipeError
from bitwright.files.hub import local
from bitwright.files.model_path import is_gguf
from bitwright.formats import FORMATS, chosen
from bitwright.gguf.architectures import named
from bitwright.gguf.imatrix import is_imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.pipeline.gguf_rows import quantize_gguf
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.gguf_tensors import GgufPlan, plan_gguf
from bitwright.plan.recipe import Recipe
from bitwright.plan.target import Target
from bitwright.plan.tensor_types import NO_TYPES, TensorTypes
from bitwright.system.device import CPU, device_of
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
    types: TensorTypes = NO_TYPES,
    adapter: Path | None = None,
    device: str = "cpu",
    size: str | None = None,
    bits: float | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> "Plan | GgufPlan":
    """Plan a run from the arguments of `quantize`; a model on the hub is downloaded first. InputError of what would stop it.

    adapter: of LoRA, added to the weights. size, bits: what the result may take; then `_for_target` chooses the schemes.
    """
    check_out(out)
    place = device_of(device)
    texts_of(calib)  # checked here, before any work
    model = local(model)
    if size is not None or bits is not None:
        _refuse({
            "--scheme": scheme, "--recipe": recipe, "--pure": pure, "--activations": activations, "--kv-cache": kv_cache,
            "--prune": prune, "--store": store, "--requantize": requantize, "--device": place != CPU, **types.options,
        })  # fmt: skip
        format, _, method = chosen(out, format, None, method)
        text = _Calibration(calib, samples, seqlen, seed)
        return _for_target(model, out, Target.parse(size, bits), format, method, text, progress)
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache, pure=pure,
        prune=prune,
    )  # fmt: skip
    rules = types.added_to(rules, method, format, one_file=FORMATS[format].one_file)
    rules = rules.without_text() if calib == "none" else rules
    if adapter is None and is_gguf(model):
        by_name = _by_name(model, rules, recipe, format, calib, place, requantize=requantize)
        if by_name is not None:
            return by_name
    from bitwright.plan.preflight import preflight

    return preflight(
        model, rules, format, samples=samples, seqlen=seqlen, requantize=requantize, adapter=adapter, device=place
    )


class _Calibration(NamedTuple):
    """The arguments that say which text is taken for calibration."""

    calib: str
    samples: int
    seqlen: int
    seed: int


def _for_target(
    model: Path, out: Path, target: Target, format: str, method: str, how: _Calibration, progress: Progress
) -> "Plan":
    """The plan whose schemes are chosen for a size or bits (planned_recipe.py); scores are kept beside OUT until it appears."""
    from bitwright.pipeline.planned_recipe import Settings, plan_recipe

    settings = Settings(format, method=method, **how._asdict())
    return plan_recipe(model, target, settings, scores=_scores_beside(out), progress=progress).plan


def _by_name(
    model: Path, rules: Recipe, recipe: Path | None, format: str, calib: str, place: torch.device, *, requantize: bool
) -> GgufPlan | None:
    """The plan of a GGUF file that becomes another one without its model; None if the model is needed, and known."""
    file, weighted = GgufFile(model), is_imatrix(calib)
    modelless = _needs_no_model(rules, recipe, format, calib)
    unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
    if not (modelless or unknown):
        return None
    if place != CPU:
        remedy = "leave out --device: rows are rounded on all threads of the CPU"
        raise InputError("a GGUF file that needs no model is made on the CPU", where="device", remedy=remedy)
    return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown, requantize=requantize)


def _refuse(given: dict[str, object]) -> None:
    """RecipeError for options beside --size or --bits that say what these choose, or no plan knows; given: values."""
    others = [name for name, value in given.items() if value]
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
