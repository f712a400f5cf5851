"""Quantize from end to end, for the command line and the Python API: from arguments to a plan to a run.

GGUF files that need no model are planned without importing transformers, which takes as long as quantizing a small one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bitwright.calibration.text_mix import check_texts, texts_of
from bitwright.errors import InputError, RecipeError
from bitwright.files.hub import local
from bitwright.files.model_path import is_gguf
from bitwright.formats import FORMATS, chosen
from bitwright.gguf.architectures import named
from bitwright.gguf.imatrix import is_imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.pipeline.gguf_rows import quantize_gguf
from bitwright.pipeline.options import QuantizeOptions
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.gguf_tensors import GgufPlan, plan_gguf
from bitwright.plan.recipe import Recipe
from bitwright.plan.target import Target
from bitwright.system.device import CPU, device_of
from bitwright.system.progress import Progress

NEEDING_NO_MODEL = ("rtn", "search", "hqq")
NOTE = "scores.json"  # of scores.py, which is not imported here: it knows models

if TYPE_CHECKING:
    import torch

    from bitwright.pipeline.planned_recipe import Settings
    from bitwright.pipeline.planned_sizes import Estimate
    from bitwright.plan.run_plan import Plan


def planned(
    model: Path,
    out: Path,
    options: QuantizeOptions,
    *,
    progress: Progress = lambda *_: None,
    announce: Callable[[str], None] = lambda _: None,
) -> "Plan | GgufPlan":
    """Plan a run; a model on the hub is downloaded first. Raises an InputError for what would stop it.

    announce: is told in a line what schemes are chosen from, where they are chosen for a target
    """
    model, place = _ready(model, out, options), device_of(options.device)
    if options.for_target:
        from bitwright.pipeline.planned_recipe import plan_recipe

        kept, asked = _scores_beside(out), _of_target(out, options)  # scores are kept until OUT appears
        return plan_recipe(model, *asked, scores=kept, progress=progress, announce=announce).plan
    one_shot = options.store is not None
    format, scheme, method = chosen(out, options.format, options.scheme, options.method, one_shot=one_shot)
    rules = options.types.added_to(options.rules(scheme, method), method, format, one_file=FORMATS[format].one_file)
    rules = rules.without_text() if options.calib == "none" else rules
    if options.adapter is None and is_gguf(model):
        by_name = _by_name(model, rules, format, options, place)
        if by_name is not None:
            return by_name
    from bitwright.plan.preflight import preflight

    return preflight(
        model, rules, format, samples=options.samples, seqlen=options.seqlen, requantize=options.requantize,
        adapter=options.adapter, device=place,
    )  # fmt: skip


def estimated(model: Path, out: Path, options: QuantizeOptions) -> "Estimate":
    """What a run for a size or bits would choose its schemes from, before any weight is read. Errors as of `planned`."""
    from bitwright.pipeline.planned_recipe import estimated as estimate

    return estimate(_ready(model, out, options), *_of_target(out, options), scores=_scores_beside(out))


def _ready(model: Path, out: Path, options: QuantizeOptions) -> Path:
    """The model's place, downloaded if need be. InputError for an OUT, a device or a text that cannot be."""
    check_out(out)
    device_of(options.device)
    check = texts_of if options.distributed else check_texts  # of several processes the first alone has the texts
    check(options.calib)
    return local(model)


def _of_target(out: Path, options: QuantizeOptions) -> "tuple[Target, Settings]":
    """The size or bits that schemes are chosen for, and how. RecipeError for options that go with neither."""
    from bitwright.pipeline.planned_recipe import Settings

    _refuse_beside_a_target(options)
    target = Target.parse(options.size, options.bits, by_plan=False)
    format, _, method = chosen(out, options.format, None, options.method)
    return target, Settings(
        format, method=method, calib=options.calib, samples=options.samples, seqlen=options.seqlen, seed=options.seed,
        requantize=options.requantize,
    )  # fmt: skip


def _refuse_beside_a_target(options: QuantizeOptions) -> None:
    """RecipeError for options beside --size or --bits that say what these choose, or that no plan knows."""
    given = {
        "--scheme": options.scheme, "--recipe": options.recipe, "--pure": options.pure,
        "--activations": options.activations, "--kv-cache": options.kv_cache, "--prune": options.prune,
        "--store": options.store, "--device": device_of(options.device) != CPU, "several processes": options.distributed,
        **options.types.options,
    }  # fmt: skip
    others = [name for name, value in given.items() if value]
    if others:
        message = f"--size and --bits choose the schemes by themselves, without {', '.join(others)}"
        remedy = "leave one of them out; bitwright plan has --schemes and --keep"
        raise RecipeError(message, where="--bits" if options.size is None else "--size", remedy=remedy)


def _by_name(
    model: Path, rules: Recipe, format: str, options: QuantizeOptions, place: "torch.device"
) -> GgufPlan | None:
    """The plan of a GGUF file that becomes another one without its model; None if the model is needed, and known."""
    file, weighted = GgufFile(model), is_imatrix(options.calib)
    modelless = _needs_no_model(rules, options, format)
    unknown = (weighted or not modelless) and named(file.key("general.architecture", str)) is None
    if not (modelless or unknown):
        return None
    if place != CPU:
        remedy = "leave out --device: rows are rounded on all threads of the CPU"
        raise InputError("a GGUF file that needs no model is made on the CPU", where="device", remedy=remedy)
    return plan_gguf(file, rules, format, weighted=weighted, unknown=unknown, requantize=options.requantize)


def _scores_beside(out: Path) -> Path:
    """Where scores are kept until OUT appears, for a run that is resumed."""
    return out.with_name(f"{out.name}.scores")


def _needs_no_model(rules: Recipe, options: QuantizeOptions, format: str) -> bool:
    """Whether a GGUF file becomes another one tensor by tensor, by rules without patterns on transformers' names."""
    modelless = all(
        rule.method in NEEDING_NO_MODEL and not (rule.transforms or rule.needs_details or rule.prune)
        for rule in rules.active
    )
    text = options.calib != "none" and not is_imatrix(options.calib)
    return format == "gguf" and modelless and not (text or options.recipe or rules.kv_cache)


def check_calibration(plan: "Plan | GgufPlan", options: QuantizeOptions) -> None:
    """Refuse, before a run, what the run would refuse of its text or importance matrix, with the same errors."""
    calib = options.calib
    if isinstance(plan, GgufPlan):
        if is_imatrix(calib):
            plan.importance(Path(calib))
        return
    from bitwright.pipeline.calibration_pass import calibration_tokens
    from bitwright.pipeline.importance import Importance
    from bitwright.pipeline.run import check_one_shot

    if is_imatrix(calib):
        Importance.of(plan, Path(calib))
    elif plan.calibrated:
        calibration_tokens(plan, calib, options.seed)
        if options.store is not None:
            check_one_shot(plan)


def carried_out(
    plan: "Plan | GgufPlan", out: Path, options: QuantizeOptions, *, progress: Progress = lambda *_: None
) -> Result:
    """Carry out a plan: `pipeline.run.run`, or `gguf_rows.quantize_gguf` where no model is needed, which one process does."""
    from bitwright.pipeline.same_work import check_same_work
    from bitwright.system import distributed

    calib, resume = options.calib, options.resume
    with distributed.joined(options.distributed):
        check_same_work(plan, options)
        if isinstance(plan, GgufPlan):
            rows = plan
            return distributed.from_first(
                lambda: quantize_gguf(rows, out, calib=calib, resume=resume, progress=progress)
            )
        from bitwright.pipeline.run import run

        done = run(plan, out, calib=calib, seed=options.seed, resume=resume, store=options.store, progress=progress)
    if (_scores_beside(out) / NOTE).is_file():
        shutil.rmtree(_scores_beside(out))
    return done
