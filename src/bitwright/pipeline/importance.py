"""Calibrate with llama.cpp's importance matrix (imatrix) instead of a text; and write an imatrix from a text."""

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.text_mix import texts_of
from bitwright.errors import RecipeError
from bitwright.files.hub import local
from bitwright.gguf import imatrix
from bitwright.gguf.imatrix import LEFT_OUT, UNSEEN, Seen
from bitwright.gguf.tensor_names import Names, expert_of
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED
from bitwright.numerics.qtensor import unpermuted
from bitwright.pipeline.calibration_pass import calibration_tokens, digest, one_shot
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.run_plan import Plan
from bitwright.system.progress import Progress


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs [K] by module name, from an importance matrix; modules that it lacks have none.

    reasons: why the columns of these modules count evenly: experts that saw no token, or that the file leaves out.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    digest: str = ""
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, file: Path) -> "Importance":
        """Read a file for this plan. RecipeError for methods that need more than an importance of columns; CalibrationError
        for a file that is damaged, or of another model."""
        more = {r.method for r in plan.recipe.active} & {*CALIBRATED, *ASYMMETRIC, *BLOCKWISE}
        if more or plan.recipe.needs_details:
            what = ", ".join(sorted(more)) or "a transform, or a fixed range,"
            message = f"an importance matrix does not say how inputs go together, which {what} must know"
            raise RecipeError(message, where=str(file), remedy="use --method search, or give a text")
        found, names = imatrix.read(file), Names(plan.skeleton.config)
        values, reasons = dict[str, Tensor](), dict[str, str]()
        for t in plan.tensors:
            if t.layer is None:
                continue
            name, expert = names.of(t.parameter), expert_of(t.parameter)
            stored = found.get(name)
            if stored is None and t.block is None:
                continue  # llama.cpp too uses it for the blocks' tensors only
            experts = 1 if expert is None else names.experts
            if stored is None and experts > 1:
                values[t.layer.name] = torch.ones(t.layer.K)
                reasons[t.layer.name] = LEFT_OUT
                continue
            if stored is None or stored.numel() != experts * t.layer.K:
                raise imatrix.of_another_model(file, name, stored, experts * t.layer.K)
            own = stored.reshape(experts, -1)[expert or 0]
            values[t.layer.name] = imatrix.evenly(unpermuted(own, t.layer.order))
            reasons |= {} if own.any() else {t.layer.name: UNSEEN}
        return cls(values, digest(file.read_bytes()), reasons)

    def inputs(self, t: PlannedTensor) -> Inputs:
        """Statistics of a matrix's inputs: the diagonal of their Gram, if the file has it."""
        assert t.layer is not None
        known = self.values.get(t.layer.name)
        return Inputs() if known is None else Inputs((t.layer.name,), gram=known)

    def noted(self, t: PlannedTensor) -> PlannedTensor:
        """The plan of a matrix, with a remark for the ledger if its columns count evenly."""
        reason = None if t.layer is None else self.reasons.get(t.layer.name)
        return t if reason is None else replace(t, reason=reason)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of matrices whose columns count evenly."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        return tuple(f"{len(names)} matrices, such as {min(names)}: {reason}" for reason, names in by_reason.items())


def write_importance(
    model: Path, out: Path, *, calib: str, samples: int, seqlen: int, seed: int = 0, progress: Progress
) -> dict[str, Any]:
    """Write the float model's mean squared inputs on a text as an importance matrix: {out, bytes, tensors, tokens}.

    Errors as of `preflight` and of calibration.
    """
    check_out(out)
    plan = preflight(local(model), Recipe.uniform("q8_0", "search"), "gguf", samples=samples, seqlen=seqlen)
    tokens = calibration_tokens(plan, calib, seed).seen
    names, found = Names(plan.skeleton.config), dict[str, list[Seen]]()
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.absolute().parent))
    try:
        store = one_shot(plan, folder, tokens, progress)
        for index in range(len(plan.skeleton)):
            for inputs in store.read(index).inputs:
                assert inputs.gram is not None
                for name in inputs.names:  # experts in order
                    columns, values = names.columns(f"{name}.weight", len(inputs.gram)), inputs.gram.diagonal()
                    seen = Seen(values if columns is None else values[columns], inputs.tokens)
                    for stored in names.tensors_of(f"{name}.weight"):
                        of_experts = found.get(stored, []) if expert_of(f"{name}.weight") is not None else []
                        found[stored] = [*of_experts, seen]
    finally:
        shutil.rmtree(folder)
    imatrix.write(
        out,
        found,
        chunks=len(tokens),
        seqlen=tokens.shape[1],
        text=", ".join(Path(text.name).name for text in texts_of(calib)),
    )
    return {"out": str(out), "bytes": out.stat().st_size, "tensors": len(found), "tokens": tokens.numel()}
