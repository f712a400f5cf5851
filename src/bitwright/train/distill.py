"""Knowledge distillation: a student is trained on labels and on the predictions of a teacher."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import RecipeError

Task = Callable[[Tensor, Tensor], Tensor]


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) for logits [..., C] at temperature T; the mean over all dimensions but the last.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. The factor T² keeps the size of the gradients.
    """
    log_p, log_q = (
        functional.log_softmax(logits.float().flatten(0, -2) / temperature, -1) for logits in (teacher, student)
    )
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    optimizer: torch.optim.Optimizer | None = None,
    task: Task = functional.cross_entropy,
    epochs: int = 1,
) -> list[float]:
    """Train a student with the loss alpha · distillation + (1 − alpha) · task; returns the loss of every step.

    student    any module in training mode, such as the teacher after `prepare_qat`
    teacher    gives the target logits; a copy is run in eval mode, without gradients
    loader     batches (x, y) of inputs and labels
    optimizer  None: Adam with learning rate 1e-4
    task       task loss, (logits, y) -> scalar

    Raises RecipeError for a temperature or alpha out of range, a student in eval mode, or a loader without batches.
    """
    if not (temperature > 0 and 0 <= alpha <= 1):
        message = f"temperature {temperature} and alpha {alpha}"
        raise RecipeError(message, remedy="a temperature above 0, and alpha from 0 (labels only) to 1 (teacher only)")
    if not student.training:
        raise RecipeError("in eval mode, where train is needed", where="student", remedy=".train()")
    teacher = copy.deepcopy(teacher).eval()
    step = optimizer or torch.optim.Adam(student.parameters(), lr=1e-4)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in loader:
            x, y = _pair(batch)
            with torch.no_grad():
                wanted = teacher(x)
            logits = student(x)
            soft = distillation_loss(logits, wanted, temperature=temperature)
            loss = alpha * soft + (1 - alpha) * task(logits, y)
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
    if not losses:
        raise RecipeError("no batches", where="loader", remedy="give at least one pair (inputs, labels)")
    return losses


def _pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels. RecipeError for a batch of another form."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        found = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise RecipeError(f"a batch is {found}", where="loader", remedy="give batches (x, y) of inputs and labels")
    return batch[0], batch[1]
