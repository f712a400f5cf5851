"""What an error in a matrix costs: the second derivative of KL with respect to the output of each of its rows.

If every token's outputs are off by dy, then to second order KL(p ‖ q) = ½ dyᵀ F dy, with the Fisher information
F = E[g gᵀ], g the gradient of log p(y) for a token y that the model itself would predict (Martens 2014, arXiv:1412.1193).
Errors of one row at different tokens, and of different rows, count as independent, and KL is linear in the losses of all
matrices (as HIGGS found, arXiv:2411.17525). Tokens count by their gradients (as in GuidedQuant, arXiv:2505.07004): one of
massive activations has by far the largest errors, and next to no gradient. The squares g² [T, N] are taken for the product of
what their rows and their columns sum up to; so row n adds ½ Fₙₙ eₙ G eₙᵀ, with the Gram G of inputs weighted by token. Both
come from one backward pass, taken block by block: memory is one block's.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.calibration.windows import Drawn
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import first_hidden_states, read_block, read_lent
from bitwright.plan.run_plan import Plan
from bitwright.system.memory import return_memory
from bitwright.system.progress import Progress

TOKENS = 4096  # that the gradients are taken of, at least one window
LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Curvature:
    """½ Fₙₙ of each output, in nats a token.

    modules    of each matrix in a block, by name: [N]
    tokens     how much each row of that matrix's inputs counts, [rows], 1 on average: those of the windows, one after another
    head       of each token's logit: [V]
    embedding  of each channel that the first block reads: [H]
    """

    modules: dict[str, Tensor]
    tokens: dict[str, Tensor]
    head: Tensor
    embedding: Tensor


def curvature(plan: Plan, windows: Tensor, progress: Progress) -> Curvature:
    """Measure the curvature on some windows of token ids [S, T], each by itself.

    plan: without a rotation; its skeleton computes in float32.
    """
    skeleton, depth = plan.skeleton, len(plan.skeleton)
    some = windows[: windows_measured(windows.shape[1])]
    tokens = some.numel()
    given = [[state] for state in embedded(plan, some)]
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
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for index in reversed(range(depth)):
        progress("gradients", 2 * depth - index - 1, 2 * depth)
        skeleton.load(read_block(plan, index) | read_lent(plan, index))
        for w, states in enumerate(given):
            gradients[w] = _back(skeleton, index, states.pop(), gradients[w], seen, rows)
        skeleton.unload(index)
        return_memory()
    progress("gradients", 2 * depth, 2 * depth)
    embedding = sum((skeleton.stream(g).float().square().sum((0, 1)) for g in gradients), torch.zeros(()))
    half = 0.5 / tokens
    counted = {name: torch.cat(parts) for name, parts in rows.items()}
    relative = {name: of / of.mean() if float(of.sum()) > 0 else torch.ones_like(of) for name, of in counted.items()}
    return Curvature({name: half * total for name, total in seen.items()}, relative, half * head, half * embedding)


def windows_measured(length: int) -> int:
    """How many windows of so many tokens gradients are taken of, each by itself."""
    return max(1, TOKENS // length)


def embedded(plan: Plan, windows: Tensor) -> list[Tensor]:
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
        del log_p, p
        return_memory()  # glibc would keep the logits of several parts
    return torch.cat(parts, 1), squares


def _back(
    skeleton: Skeleton,
    index: int,
    given: Tensor,
    gradient: Tensor,
    seen: dict[str, Tensor],
    rows: dict[str, list[Tensor]],
) -> Tensor:
    """The gradient with respect to block `index`'s input. Squares of that of every matrix's outputs are summed up over tokens,
    and added to `seen`; and over outputs, and appended to `rows`."""
    x = given.detach().clone().requires_grad_(True)
    squares: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def watch(name: str, out: Tensor) -> None:
        if out.requires_grad:
            calls, at = squares[name], len(squares[name])
            calls.append((torch.zeros(out.shape[-1]), torch.zeros(out.shape[:-1].numel())))

            def keep(g: Tensor) -> None:
                square = _finite(g.float().flatten(0, -2)).square()
                calls[at] = square.sum(0), square.sum(1)

            out.register_hook(keep)

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
    for name, calls in squares.items():
        seen[name] = seen.get(name, 0) + torch.stack([of_row for of_row, _ in calls]).sum(0)
        rows[name] += [of_token for _, of_token in calls]
    return _finite(found)


def _finite(gradient: Tensor) -> Tensor:
    """The gradient, with 0 where there is none, as of a root at 0 (Gemma 3n)."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class WeightedInputs:
    """A matrix's inputs x [rows, K] with the weights γ [rows] of `Curvature.tokens`, and their Grams, [K, K] float32.

    Grams are taken when they are asked for: those of all experts at once would fill the memory.
    """

    x: Tensor
    counted: Tensor

    def gram(self) -> Tensor:
        """Σ γₜ xₜ xₜᵀ / T."""
        return self._of(self.x.float())

    def of_rounding(self, activations: Scheme) -> Tensor:
        """The same of rounded x − x."""
        x = self.x.float()
        return self._of(InputQuantization(activations)(x) - x)

    def _of(self, x: Tensor) -> Tensor:
        return x.T @ (x * self.counted[:, None]) / len(x)


@torch.no_grad()
def weighted_inputs(
    skeleton: Skeleton,
    index: int,
    windows: list[Tensor],
    tokens: Mapping[str, Tensor],
) -> dict[str, WeightedInputs]:
    """The weighted inputs of each matrix of block `index`.

    windows: the block's inputs [1, T, H] for those that gradients were taken of, which become its outputs; its weights must be
    loaded. An expert whose router decides otherwise here than when gradients were taken counts all of its tokens alike.
    """
    read: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> "torch.utils.hooks.RemovableHandle":
        module: nn.Module = skeleton.model.get_submodule(name)
        return module.register_forward_pre_hook(lambda _, args: read[name].append(args[0].flatten(0, -2)))

    hooks = [hook(name) for name in skeleton.linears(index) if name in tokens]
    try:
        windows[:] = [skeleton.run(index, window) for window in windows]
    finally:
        for one in hooks:
            one.remove()
    found = {}
    for name in list(read):
        x, counted = torch.cat(read.pop(name)), tokens[name]
        counted = counted.to(x.device) if len(counted) == len(x) else torch.ones(len(x), device=x.device)
        found[name] = WeightedInputs(x, counted)
    return found
