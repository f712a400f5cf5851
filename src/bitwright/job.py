"""Quantizing from end to end, as the command line and the Python API do it: what is asked for, a plan, a run."""

from pathlib import Path

from bitwright.byname import NamePlan, is_unknown, plan_by_name, run_by_name
from bitwright.formats import chosen
from bitwright.llamacpp.imatrix import is_imatrix
from bitwright.pipeline import Result, run
from bitwright.preflight import Plan, preflight
from bitwright.recipe import Recipe
from bitwright.streams import Progress
from bitwright.workplace import check_out


def planned(
    model: Path, out: Path, *, scheme: str | None, method: str | None, format: str | None, pure: bool, activations: str | None,
    observer: str, kv_cache: str | None, recipe: Path | None, calib: str, samples: int, seqlen: int, store: Path | None,
) -> Plan | NamePlan:  # fmt: skip
    """What will be done. Raises the InputError of whatever would stop it."""
    check_out(out)
    format, scheme, method = chosen(out, format, scheme, method, one_shot=store is not None)
    rules = Recipe.of(
        recipe, scheme=scheme, method=method, activations=activations, observer=observer, kv_cache=kv_cache, pure=pure
    )
    rules = rules.without_text() if calib == "none" else rules
    if is_unknown(model):
        return plan_by_name(model, rules, format, weighted=is_imatrix(calib))
    return preflight(model, rules, format, samples=samples, seqlen=seqlen)


def carried_out(
    plan: Plan | NamePlan, out: Path, *, calib: str, seed: int, resume: bool, store: Path | None, progress: Progress
) -> Result:
    """See `pipeline.run`, and `byname` for models that cannot be run."""
    if isinstance(plan, NamePlan):
        return run_by_name(plan, out, calib=calib, resume=resume, progress=progress)
    return run(plan, out, calib=calib, seed=seed, resume=resume, store=store, progress=progress)
