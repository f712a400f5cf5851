"""What an error in a matrix costs: the second derivative of KL with respect to the output of each of its rows.

If every token's outputs are off by dy, then to second order KL(p ‖ q) = ½ dyᵀ F dy, with the Fisher information
F = E[g gᵀ], g the gradient of log p(y) for a token y that the model itself would predict (Martens 2014, arXiv:1412.1193).
Errors of one row at different tokens, and of different rows, count as independent: so a row n whose errors have the mean
square lₙ adds ½ Fₙₙ lₙ, and KL is linear in the losses of all matrices (as HIGGS found, arXiv:2411.17525). The diagonal comes
from one backward pass, taken block by block, so that memory is one block's.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.calibration.windows import Drawn
from bitwright.models.skeleton import Skeleton
from bitwright.pipeline.calibration_pass import first_hidden_states, read_block, read_lent
from bitwright.plan.preflight import Plan
from bitwright.system.progress import Progress

TOKENS = 4096  # that the gradients are taken of, at least one window
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Curvature:
    """½ Fₙₙ of each output, in nats a token.

    modules    of each matrix in a block, by name: [N]
    head       of each token's logit: [V]
    embedding  of each channel that the first block reads: [H]
    """

    modules: dict[str, Tensor]
    head: Tensor
    embedding: Tensor


def curvature(plan: Plan, windows: Tensor, progress: Progress) -> Curvature:
    """Measure the curvature on some windows of token ids [S, T], each by itself.

    plan: without a rotation; its skeleton computes in float32.
    """
    skeleton, depth = plan.skeleton, len(plan.skeleton)
    some = windows[: max(1, TOKENS // windows.shape[1])]
    tokens = some.numel()
    given = [[state] for state in _embedded(plan, some)]
    for index in range(depth):
        progress("gradients", index, 2 * depth)
        skeleton.load(read_block(plan, index) | read_lent(plan, index))
        for states in given:
            states.append(skeleton.run(index, states[-1]))
        skeleton.unload(index)
    skeleton.load(read_block(plan, depth))
    generator = torch.Generator().manual_seed(0)
    ends = [_head(skeleton, states.pop(), generator) for states in given]
    skeleton.unload_outside()
    gradients, head = [end[0] for end in ends], sum((end[1] for end in ends), torch.zeros(()))
    seen: dict[str, Tensor] = {}
    for index in reversed(range(depth)):
        progress("gradients", 2 * depth - index - 1, 2 * depth)
        skeleton.load(read_block(plan, index) | read_lent(plan, index))
        for w, states in enumerate(given):
            gradients[w] = _back(skeleton, index, states.pop(), gradients[w], seen)
        skeleton.unload(index)
    progress("gradients", 2 * depth, 2 * depth)
    embedding = sum((skeleton.stream(g).float().square().sum((0, 1)) for g in gradients), torch.zeros(()))
    half = 0.5 / tokens
    return Curvature({name: half * total for name, total in seen.items()}, half * head, half * embedding)


def _embedded(plan: Plan, windows: Tensor) -> list[Tensor]:
    """The first block's input for each window, [1, T, H]."""
    return [
        state[None] for batch in first_hidden_states(plan, Drawn(windows, windows[:0]), None).given for state in batch
    ]


def _head(skeleton: Skeleton, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The gradient [1, T, H] of the log-likelihood of sampled tokens; Σ p (1 − p) of each token of the vocabulary."""
    parts, squares = [], torch.zeros(())
    step = max(1, LOGITS_AT_ONCE // int(skeleton.config.get_text_config().vocab_size))
    for part in hidden.split(step, 1):
        x = part.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            log_p = skeleton.head_with(x).log_softmax(-1)[0]
            p = log_p.detach().exp()
            drawn = torch.multinomial(p, 1, generator=generator)
            (gradient,) = torch.autograd.grad(log_p.gather(-1, drawn).sum(), x)
        parts.append(gradient)
        squares = squares + (p * (1 - p)).sum(0)
    return torch.cat(parts, 1), squares


def _back(skeleton: Skeleton, index: int, given: Tensor, gradient: Tensor, seen: dict[str, Tensor]) -> Tensor:
    """The gradient with respect to block `index`'s input; squares of that of every matrix's outputs are added to `seen`."""
    x = given.detach().clone().requires_grad_(True)
    sums: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: sums[name].append(g.float().flatten(0, -2).square().sum(0)))

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        module: nn.Module = skeleton.model.get_submodule(name)
        return module.register_forward_hook(lambda _, __, out: watch(name, out))

    hooks = [hook(name) for name in skeleton.linears(index)]
    try:
        with torch.enable_grad():
            out = skeleton.run_with(index, x, {})
        (found,) = torch.autograd.grad(out, x, gradient)
    finally:
        for one in hooks:
            one.remove()
    for name, parts in sums.items():
        seen[name] = seen.get(name, 0) + torch.stack(parts).sum(0)
    return found
