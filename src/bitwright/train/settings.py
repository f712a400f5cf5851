"""Settings of `finetune`."""

import math
from dataclasses import dataclass
from pathlib import Path

from bitwright.errors import RecipeError

LORA_RATE, SCALES_RATE = 2e-4, 1e-3
ZERO, RESIDUAL = "zero", "residual"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a run.

    scheme       what a float model's matrices are rounded to in memory; "float": they stay; None: nf4-g64-dq
    rank, alpha  of LoRA; alpha None: 2 · rank. rslora, dora: these variants; targets: module names, None: all linear layers
    init         where an adapter begins: "zero", adding nothing; "residual": as near as its rank comes to the teacher's weights
                 less the rounded ones
    scales_only  train the scales and norms of a quantized model instead of an adapter
    steps, batch, seqlen   steps of so many windows of so many tokens
    lr, warmup   the largest learning rate, and the share of steps over which it rises; then it falls to 0 along a cosine.
                 lr None: 2e-4 for adapters, 1e-3 for scales
    save_every   steps between checkpoints
    teacher      a model whose predictions are learned, instead of the text's tokens
    Raises RecipeError for a number out of range, and settings of an adapter where none is trained.
    """

    scheme: str | None = None
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | None = None
    init: str = ZERO
    scales_only: bool = False
    steps: int = 300
    batch: int = 8
    seqlen: int = 256
    lr: float | None = None
    warmup: float = 0.03
    seed: int = 0
    save_every: int = 50
    teacher: Path | None = None

    def __post_init__(self) -> None:
        whole = {"rank": self.rank, "steps": self.steps, "batch": self.batch, "save_every": self.save_every}
        wrong = next((name for name, value in whole.items() if value < 1), None)
        if wrong is not None or self.seqlen < 2:
            name = wrong or "seqlen"
            remedy = f"--{name.replace('_', '-')} {1 if wrong else 2}, or more"
            raise RecipeError(f"{name} {whole.get(name, self.seqlen)} is too small", remedy=remedy)
        if not (0 < self.largest_rate < math.inf and 0 <= self.warmup <= 1):
            message = f"a learning rate of {self.lr} with warmup {self.warmup}"
            raise RecipeError(message, remedy="--lr 2e-4: above 0; a warmup from 0 to 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RecipeError(f"alpha {self.alpha} is not above 0, and finite", remedy=f"--alpha {2 * self.rank}")
        if self.init not in (ZERO, RESIDUAL) or (self.init == RESIDUAL and (self.dora or self.teacher is None)):
            beside = "--dora" if self.dora else "no --teacher, whose weights it needs"
            message = f"init {self.init!r}" + (f" and {beside}" if self.init == RESIDUAL else "")
            raise RecipeError(
                message, remedy=f"--init {RESIDUAL} with --teacher MODEL and without --dora, or --init {ZERO}"
            )
        of_adapters = [name for name in ("scheme", "alpha", "rslora", "dora", "targets") if getattr(self, name)]
        of_adapters += ["init"] if self.init != ZERO else []
        if self.scales_only and of_adapters:
            remedy = f"leave out --{of_adapters[0]}, or --scales-only"
            raise RecipeError(f"scales are trained without an adapter, and {of_adapters[0]} is of one", remedy=remedy)

    @property
    def usual_rate(self) -> float:
        """The largest learning rate where none is given."""
        return SCALES_RATE if self.scales_only else LORA_RATE

    @property
    def largest_rate(self) -> float:
        """The largest learning rate."""
        return self.usual_rate if self.lr is None else self.lr

    @property
    def lower_rate(self) -> float:
        """What to try where a run went astray."""
        return min(self.largest_rate / 4, self.usual_rate)

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps − 1."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.largest_rate * (step + 1) / rising
        along = (step - rising) / max(1, self.steps - rising)
        return self.largest_rate * 0.5 * (1 + math.cos(math.pi * along))
