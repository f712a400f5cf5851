"""Knowledge distillation: a student learns from labels and from what a teacher predicts."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.errors import RecipeError

Task = Callable[[Tensor, Tensor], Tensor]


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of logits [..., C] softened by T, a mean over all but the last axis.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; the T² keeps the gradients' size.
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
    """Train the student on batches (x, y) by alpha · distillation + (1 − alpha) · task loss; the losses, step by step.

    student    any module in training mode, such as what `prepare_qat` made of the teacher
    teacher    gives the logits that the student should give; run as it is in eval mode, without gradients
    optimizer  None: Adam with rate 1e-4
    task       (logits, y) -> loss

    Raises RecipeError for a temperature or alpha out of bounds, a student in eval mode, or a loader without batches.
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
        for x, y in loader:
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
