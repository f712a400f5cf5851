"""Fine-tune a language model by LoRA beside its quantized weights (QLoRA, arXiv:2305.14314), on text or conversations.

The adapter is peft's. AdamW with warmup and a cosine; a step's gradients are summed over windows that are run a few at a time.
With a teacher the loss is the KL divergence from what the teacher predicts (distillation), instead of the text's own tokens.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import CheckpointError, InputError, NumericsError, RecipeError
from bitwright.files.hub import local
from bitwright.inference.loading import load
from bitwright.models.adapter import BASE
from bitwright.models.adapter_base import base_record
from bitwright.models.config import read_config
from bitwright.models.families import positions_of
from bitwright.models.skeleton import best_dtype
from bitwright.models.source import open_weights
from bitwright.system.memory import peak_rss_bytes
from bitwright.system.progress import Progress
from bitwright.train.adapters import prepare_for_training, renamed
from bitwright.train.checkpoints import Checkpoints
from bitwright.train.data import IGNORED, Data, Windows, training_data
from bitwright.train.distill import distillation_loss
from bitwright.version import __version__

if TYPE_CHECKING:
    from peft import PeftModel

AT_ONCE = 512  # tokens that are run at a time
CLIP = 1.0  # largest norm of a step's gradient
EXTRA = "pip install 'bitwright[train]'"


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of a run.

    scheme       what a float model's matrices are rounded to in memory; "float": they stay; None: nf4-g64-dq
    rank, alpha  of LoRA; alpha None: 2 · rank. rslora, dora: these variants; targets: module names, None: all linear layers
    steps, batch, seqlen   steps of so many windows of so many tokens
    lr, warmup   the largest learning rate, and the share of steps over which it rises; then it falls to 0 along a cosine
    save_every   steps between checkpoints
    teacher      a model whose predictions are learned, instead of the text's tokens
    Raises RecipeError for a number out of range.
    """

    scheme: str | None = None
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | None = None
    steps: int = 300
    batch: int = 8
    seqlen: int = 256
    lr: float = 2e-4
    warmup: float = 0.03
    seed: int = 0
    save_every: int = 50
    teacher: Path | None = None

    def __post_init__(self) -> None:
        whole = {"rank": self.rank, "steps": self.steps, "batch": self.batch, "save_every": self.save_every}
        wrong = next((name for name, value in whole.items() if value < 1), None)
        if wrong is not None or self.seqlen < 2:
            name = wrong or "seqlen"
            raise RecipeError(
                f"{name} {whole.get(name, self.seqlen)} is too small", remedy=f"--{name.replace('_', '-')} 16"
            )
        if not (0 < self.lr < math.inf and 0 <= self.warmup <= 1):
            message = f"a learning rate of {self.lr} with warmup {self.warmup}"
            raise RecipeError(message, remedy="--lr 2e-4: above 0; a warmup from 0 to 1")

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps − 1."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))


@dataclass(frozen=True)
class Report:
    """What `finetune` did. Losses: means of −log p (with a teacher, of KL) over the tokens that count, on what is held out."""

    adapter: str
    steps: int
    tokens: int
    trained: int  # parameters
    optimizer: str
    loss_before: float
    loss_after: float
    losses: list[float] = field(repr=False)
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def finetune(
    model: Path, out: Path, *, data: str, how: Training, resume: bool = True, progress: Progress = lambda *_: None
) -> Report:
    """Train a LoRA adapter of `model` on `data`, and save it as peft does in `out`, which appears when it is complete.

    model: a checkpoint, float or quantized, or GGUF file; data: text, or a .jsonl file of conversations (see data.py). Raises
    RecipeError for settings out of range or where peft is missing; CheckpointError, CalibrationError, InputError or OutputError
    for a model, data or a place that cannot be used; NumericsError, with the step, for a loss that is not finite.
    """
    _needs_peft()
    model = local(model)
    config = read_config(model)
    limit = positions_of(config.get_text_config())
    if limit is not None and how.seqlen > limit:
        message = f"windows of {how.seqlen} tokens, and the model knows {limit} positions"
        raise InputError(message, where=str(model), remedy=f"--seqlen {limit}")
    vocabulary = int(config.get_text_config().vocab_size)
    given = training_data(
        load_tokenizer(model), data, seqlen=how.seqlen, vocabulary=vocabulary, windows=how.steps * how.batch,
        seed=how.seed, where=str(model),
    )  # fmt: skip
    quantized = not open_weights(model).is_float
    base = base_record(model, quantized=quantized)
    checkpoints = Checkpoints(out, _manifest(how, given, base), resume=resume)
    default = None if quantized else "nf4-g64-dq"
    scheme = None if how.scheme == "float" else how.scheme or default
    run = _Run(model, how, given, scheme, checkpoints, progress)
    report = run.train(str(out))
    checkpoints.finish(run.adapted, report.as_dict(), base, BASE)
    return report


def _needs_peft() -> None:
    if find_spec("peft") is None:
        raise RecipeError("training an adapter needs peft, which is not installed", remedy=EXTRA)


def _manifest(how: Training, data: Data, base: bytes) -> dict[str, Any]:
    """What unfinished work belongs to."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(how).items()}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "settings": json.loads(json.dumps(settings)),
        "base": json.loads(base),
        "data": [_sum(part) for part in (data.seen, data.held_out)],
        "optimizer": "bitsandbytes" if find_spec("bitsandbytes") else "torch",
    }


def _sum(windows: Windows) -> list[int]:
    """A fingerprint of windows: their shape, and a weighted sum of ids and labels."""
    order = torch.arange(1, windows.ids.numel() + 1)
    return [*windows.ids.shape, *(int((t.flatten() * order).sum()) for t in (windows.ids, windows.labels))]


class _Run:
    """One run: the model with its adapter, the optimizer, and the data."""

    def __init__(
        self, model: Path, how: Training, data: Data, scheme: str | None, checkpoints: Checkpoints, progress: Progress
    ) -> None:
        self.how, self.data, self.checkpoints, self.progress = how, data, checkpoints, progress
        dtype = best_dtype()
        self.adapted = _adapted(model, how, scheme, dtype)
        self.teacher = None if how.teacher is None else _teacher(how.teacher, self.adapted, dtype)
        self.trained = [p for p in self.adapted.parameters() if p.requires_grad]
        self.optimizer, self.optimizer_name = _optimizer(self.trained)

    def train(self, name: str) -> Report:
        """All steps that are left."""
        begun, how = time.monotonic(), self.how
        state = self.checkpoints.restore(self.adapted, self.optimizer)
        first, losses = int(state["step"]), list(state.get("losses", []))
        before = state["before"] if first else self.judge()
        for step in range(first, how.steps):
            losses.append(self._step(step, before, losses))
            spent = time.monotonic() - begun
            speed = (step + 1 - first) * how.batch * how.seqlen / spent
            said = f"step, loss {losses[-1]:.4f}, {speed:,.0f} tokens/s, {peak_rss_bytes() / 1e6:,.0f} MB"
            self.progress(said, step + 1, how.steps)
            if (step + 1) % how.save_every == 0 and step + 1 < how.steps:
                self.checkpoints.save(step + 1, self.adapted, self.optimizer, {"losses": losses, "before": before})
        spent, tokens = time.monotonic() - begun, how.steps * how.batch * how.seqlen
        done = max(1, how.steps - first) * how.batch * how.seqlen
        return Report(
            name, how.steps, tokens, sum(p.numel() for p in self.trained), self.optimizer_name, before, self.judge(),
            losses, spent, done / spent, peak_rss_bytes(), self.data.notes,
        )  # fmt: skip

    def _step(self, step: int, before: float, losses: list[float]) -> float:
        """One step of the optimizer; its loss. NumericsError if that or its gradient is not finite: nothing is changed then."""
        windows = self.data.seen.take(_draw(len(self.data.seen), step, self.how))
        count = int((windows.labels[:, 1:] != IGNORED).sum())
        self.optimizer.zero_grad()
        total = 0.0
        for part in _parts(windows):
            lost = self._lost(part) / count
            lost.backward()
            total += float(lost.detach())
        norm = float(nn.utils.clip_grad_norm_(self.trained, CLIP))
        if not math.isfinite(total + norm):
            good = "nothing was trained yet"
            if step:
                kept = self.checkpoints.save(step, self.adapted, self.optimizer, {"losses": losses, "before": before})
                good = f"the adapter after {step} steps is in {kept}"
            message = f"step {step + 1}: the loss is {total} and the norm of its gradient {norm}; {good}"
            raise NumericsError(message, remedy=f"--restart with a lower rate, such as --lr {self.how.lr / 4:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(step)
        self.optimizer.step()
        return total

    def _lost(self, part: Windows) -> Tensor:
        """The sum of the loss over the tokens of some windows that count."""
        wanted = part.labels[:, 1:].flatten()
        counted = wanted != IGNORED
        logits = self._logits(self.adapted, part)[counted]
        if self.teacher is None:
            return functional.cross_entropy(logits.float(), wanted[counted], reduction="sum")
        with torch.no_grad():
            meant = self._logits(self.teacher, part)[counted]
        return distillation_loss(logits, meant, temperature=1.0) * len(logits)

    @staticmethod
    def _logits(model: nn.Module, part: Windows) -> Tensor:
        """What is predicted at every position but the last, [n, V]."""
        logits: Tensor = model(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
        return logits[:, :-1].flatten(0, 1)

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss on what is held out."""
        held = self.data.held_out
        self.adapted.eval()
        total = sum(float(self._lost(part)) for part in _parts(held))
        self.adapted.train()
        return total / int((held.labels[:, 1:] != IGNORED).sum())


def _adapted(model: Path, how: Training, scheme: str | None, dtype: torch.dtype) -> "PeftModel":
    """The model with a new adapter. RecipeError for module names that it has not."""
    from peft import LoraConfig, get_peft_model

    base = prepare_for_training(load(model, scheme=scheme, dtype=dtype))
    alpha = 2 * how.rank if how.alpha is None else how.alpha
    config = LoraConfig(
        r=how.rank, lora_alpha=alpha, use_rslora=how.rslora, use_dora=how.dora, task_type="CAUSAL_LM",  # type: ignore[arg-type]
        target_modules="all-linear" if how.targets is None else list(how.targets),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        try:
            with renamed():
                adapted = get_peft_model(base, config)
        except ValueError as error:
            message = str(error).split(". ")[0].splitlines()[0]
            raise RecipeError(
                message, where=str(model), remedy="--targets q_proj,v_proj, as the model names them"
            ) from error
    adapted.peft_config["default"].base_model_name_or_path = _name(model, base.config.name_or_path)
    adapted.train()
    return adapted


def _name(model: Path, known: str) -> str:
    """The base's name in the adapter's config: that on the hub if config.json has it, else where it lies."""
    return known if "/" in known and not Path(known).exists() else str(model.resolve())


def _teacher(path: Path, student: "PeftModel", dtype: torch.dtype) -> nn.Module:
    """The teacher. CheckpointError if its vocabulary is not the student's."""
    teacher = load(local(path), dtype=dtype).requires_grad_(False).eval()
    sizes = [int(m.config.get_text_config().vocab_size) for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        message = f"the teacher's vocabulary has {sizes[0]} tokens, the model's {sizes[1]}"
        raise CheckpointError(
            message, where=str(path), remedy="a teacher of the same tokenizer, such as the float original"
        )
    return teacher


def _optimizer(trained: list[nn.Parameter]) -> tuple[Optimizer, str]:
    """bitsandbytes' AdamW with states in 8 bits where it is installed, else torch's; and its name."""
    if find_spec("bitsandbytes") is None:
        return AdamW(trained, weight_decay=0.0), "torch AdamW: states in float32 (8 bits with bitsandbytes installed)"
    from bitsandbytes.optim.adamw import AdamW8bit

    made: Optimizer = AdamW8bit(trained, weight_decay=0.0)  # type: ignore[no-untyped-call]
    return made, "bitsandbytes AdamW, states in 8 bits"


def _draw(windows: int, step: int, how: Training) -> Tensor:
    """The windows of a step, of the data in an order that is shuffled anew for each pass over them."""
    taken = []
    for at in range(step * how.batch, (step + 1) * how.batch):
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + at // windows)
        taken.append(torch.randperm(windows, generator=generator)[at % windows])
    return torch.stack(taken)


def _parts(windows: Windows) -> Iterator[Windows]:
    """A few windows at a time."""
    some = max(1, AT_ONCE // windows.ids.shape[1])
    return (windows.take(index) for index in torch.arange(len(windows)).split(some))
