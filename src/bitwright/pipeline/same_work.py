"""Several processes work together only on the same work: what each was asked for is compared before anything else."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from bitwright.errors import RecipeError
from bitwright.pipeline.options import QuantizeOptions
from bitwright.plan.gguf_tensors import GgufPlan
from bitwright.system import distributed
from bitwright.version import __version__

if TYPE_CHECKING:
    from bitwright.plan.run_plan import Plan

OWN = ("recipe", "store", "adapter", "device")  # paths, whose contents count, and what may differ


def check_same_work(plan: "Plan | GgufPlan", options: QuantizeOptions) -> None:
    """RecipeError, in all processes that work together, where one has other work than the first; or for a store of statistics.

    Files are compared by name and size: a copy on another machine has another time of change.
    """
    if distributed.count() == 1:
        return
    everyone = distributed.everyone(_work(plan, options))
    for rank, other in enumerate(everyone):
        for key, meant in everyone[0].items():
            if other.get(key) != meant:
                remedy = "give every process the same checkpoint, options and versions"
                message = f"process {rank} has {key} {other.get(key)!r}, process 0 {meant!r}"
                raise RecipeError(message, where="distributed", remedy=remedy)
    if options.store is not None:
        remedy = "leave out --store, or make it in one process"
        raise RecipeError("statistics are not stored by several processes together", where="--store", remedy=remedy)


def _work(plan: "Plan | GgufPlan", options: QuantizeOptions) -> dict[str, Any]:
    """What must be the same, by name."""
    asked = {key: value for key, value in asdict(options).items() if key not in OWN}
    common = {"bitwright": __version__, "torch": torch.__version__, "store": options.store is not None, **asked}
    if isinstance(plan, GgufPlan):
        return {"model": "a GGUF file by its tensors' names", **common}
    return {
        "model": [[name, size] for name, size, _ in plan.checkpoint.fingerprint()],
        **common,
        "computed in": str(plan.skeleton.dtype),
        "rules": [rule.describe() for rule in plan.recipe.rules],
        "adapter": None if plan.adapter is None else plan.adapter.digest,
    }
