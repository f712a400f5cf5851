"""Fine-tune a language model by LoRA beside its quantized weights (QLoRA, arXiv:2305.14314), or its scales and norms alone, on
text or conversations.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import CheckpointError, InputError, NumericsError, RecipeError
from bitwright.files.hub import local
from bitwright.inference.loading import load
from bitwright.models.adapter_base import base_record
from bitwright.models.config import read_config
from bitwright.models.families import positions_of
from bitwright.models.source import open_weights
from bitwright.system.device import best_dtype
from bitwright.system.memory import keep_memory, peak_rss_bytes
from bitwright.system.progress import Progress
from bitwright.train.checkpoints import Checkpoints
from bitwright.train.cross_entropy import cross_entropy
from bitwright.train.data import IGNORED, Data, Windows, training_data
from bitwright.train.distill import distillation_loss
from bitwright.train.lora import Lora
from bitwright.train.packing import keeps_apart, one_by_one
from bitwright.train.scales import ScalesAndNorms
from bitwright.train.settings import RESIDUAL, Training
from bitwright.train.trained import Trained
from bitwright.version import __version__

AT_ONCE = 512  # tokens that are run at a time
CLIP = 1.0  # largest norm of a step's gradient
ONE_BY_ONE = "this model would see packed conversations through one another: each was run by itself"
EXTRA = "pip install 'bitwright[train]'"


@dataclass(frozen=True)
class Report:
    """What `finetune` did. Losses: means of −log p (with a teacher, of KL) over the tokens that count, on what is held out;
    tokens_per_second: of steps alone, seconds: of all, with those losses."""

    out: str
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

    With `how.scales_only`: the scales and norms of a quantized directory, and `out` is a directory like it. model: a
    checkpoint, float or quantized, or GGUF file; data: text, or a .jsonl file of conversations (see data.py). Raises
    RecipeError for settings out of range, scales that cannot be trained, or where peft is missing; CheckpointError,
    CalibrationError, InputError or OutputError for a model, data or a place that cannot be used; NumericsError, with the
    step, for a loss that is not finite.
    """
    if not how.scales_only:
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
    if how.init == RESIDUAL and not quantized:
        remedy = f"bitwright quantize {model} Q --scheme int2-g32 --format bitwright, then Q with --teacher {model}"
        raise RecipeError("a model in float has no rounding to begin at", where=str(model), remedy=remedy)
    base = base_record(model, quantized=quantized, makes_up=how.init == RESIDUAL)
    checkpoints = Checkpoints(out, _manifest(how, given, base), resume=resume)
    keep_memory()
    if how.scales_only:
        trained: Trained = ScalesAndNorms(model, best_dtype())
    else:
        default = None if quantized else "nf4-g64-dq"
        scheme = None if how.scheme == "float" else how.scheme or default
        trained = Lora(model, how, scheme, best_dtype(), base)
    report = _Run(trained, how, given, checkpoints, progress).train(str(out))
    checkpoints.finish(trained, report.as_dict())
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
    """One run: what is trained, the optimizer, and the data."""

    def __init__(
        self, trained: Trained, how: Training, data: Data, checkpoints: Checkpoints, progress: Progress
    ) -> None:
        self.trained, self.how, self.data, self.checkpoints, self.progress = trained, how, data, checkpoints, progress
        self.teacher = None if how.teacher is None else _teacher(how.teacher, trained.model)
        models = [trained.model] if self.teacher is None else [trained.model, self.teacher]
        packed = data.seen.positions is not None
        self.apart = packed and not all(keeps_apart(m, self._logits, _vocabulary(m)) for m in models)
        self.parameters = [p for p in trained.model.parameters() if p.requires_grad]
        self.optimizer, self.optimizer_name = _optimizer(self.parameters)

    def train(self, name: str) -> Report:
        """All steps that are left."""
        begun, how = time.monotonic(), self.how
        state = self.checkpoints.restore(self.trained, self.optimizer)
        first, losses = int(state["step"]), list(state.get("losses", []))
        before, stepping = state["before"] if first else self.judge(), 0.0
        for step in range(first, how.steps):
            at = time.monotonic()
            losses.append(self._step(step, before, losses))
            stepping += time.monotonic() - at
            speed = (step + 1 - first) * how.batch * how.seqlen / stepping
            said = f"step, loss {losses[-1]:.4f}, {speed:,.0f} tokens/s, {peak_rss_bytes() / 1e6:,.0f} MB"
            self.progress(said, step + 1, how.steps)
            if (step + 1) % how.save_every == 0 and step + 1 < how.steps:
                self.checkpoints.save(step + 1, self.trained, self.optimizer, {"losses": losses, "before": before})
        self.trained.settle()
        after, done = self.judge(), (how.steps - first) * how.batch * how.seqlen
        worse = f"the loss rose from {before:.4g} to {after:.4g} on what was held out: try --lr {how.lower_rate:g}"
        return Report(
            name, how.steps, how.steps * how.batch * how.seqlen, sum(p.numel() for p in self.parameters), self.optimizer_name,
            before, after, losses, time.monotonic() - begun, done / stepping if stepping else 0.0, peak_rss_bytes(),
            (*self.data.notes, *self.trained.notes, *[ONE_BY_ONE] * self.apart, *[worse] * (after > before)),
        )  # fmt: skip

    def _step(self, step: int, before: float, losses: list[float]) -> float:
        """One step of the optimizer; its loss. NumericsError if that or its gradient is not finite: nothing is changed then."""
        windows = self.data.seen.take(drawn(len(self.data.seen), step, self.how))
        count = int((windows.labels[:, 1:] != IGNORED).sum())
        self.optimizer.zero_grad()
        total = 0.0
        for part in self._parts(windows):
            lost = self._lost(part, count)
            lost.backward()
            total += float(lost.detach())
        norm = float(nn.utils.clip_grad_norm_(self.parameters, CLIP))
        if not math.isfinite(total + norm):
            good = "nothing was trained yet"
            if step:
                kept = self.checkpoints.save(step, self.trained, self.optimizer, {"losses": losses, "before": before})
                good = f"what was trained in {step} steps is in {kept}"
            message = f"step {step + 1}: the loss is {total} and the norm of its gradient {norm}; {good}"
            raise NumericsError(message, remedy=f"--restart with a lower rate, such as --lr {self.how.lower_rate:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(step)
        self.optimizer.step()
        return total

    def _lost(self, part: Windows, over: int) -> Tensor:
        """The sum of the loss over the tokens of some windows that count, over so many."""
        wanted = functional.pad(part.labels[:, 1:], (0, 1), value=IGNORED).flatten()  # nothing follows the last
        logits = self._logits(self.trained.model, part)
        if self.teacher is None:
            return cross_entropy(logits, wanted, IGNORED, over=over)
        counted = wanted != IGNORED
        with torch.no_grad():
            meant = self._logits(self.teacher, part)[counted]
        return distillation_loss(logits[counted], meant, temperature=1.0) * (len(meant) / over)

    def _parts(self, windows: Windows) -> Iterator[Windows]:
        """A few windows at a time; or each conversation by itself, where a model would see those before it."""
        if self.apart:
            return one_by_one(windows)
        some = max(1, AT_ONCE // windows.ids.shape[1])
        return (windows.take(index) for index in torch.arange(len(windows)).split(some))

    @staticmethod
    def _logits(model: nn.Module, part: Windows) -> Tensor:
        """What is predicted at every position, [n, V]."""
        logits: Tensor = model(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
        return logits.flatten(0, 1)

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss on what is held out."""
        held = self.data.held_out
        self.trained.model.eval()
        count = int((held.labels[:, 1:] != IGNORED).sum())
        total = sum(float(self._lost(part, count)) for part in self._parts(held))
        self.trained.model.train()
        return total


def _vocabulary(model: nn.Module) -> int:
    return int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def _teacher(path: Path, student: nn.Module) -> nn.Module:
    """The teacher. CheckpointError if its vocabulary is not the student's."""
    teacher = load(local(path), dtype=best_dtype()).requires_grad_(False).eval()
    sizes = [_vocabulary(model) for model in (teacher, student)]
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


def drawn(windows: int, step: int, how: Training) -> Tensor:
    """The windows of a step, of the data in an order that is shuffled anew for each pass over them."""
    taken = []
    for at in range(step * how.batch, (step + 1) * how.batch):
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + at // windows)
        taken.append(torch.randperm(windows, generator=generator)[at % windows])
    return torch.stack(taken)
