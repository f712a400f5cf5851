"""Where a block can take channel scales without changing what it computes: found, then proved.

Some linear maps read an input x [T, K] that a *producer* made: a norm, whose weight multiplies each channel, or another
linear map, whose rows make the channels. Dividing the producer's output by s [K] and multiplying the readers' columns by s
leaves the function as it was; a method may choose s. Producers that are norms are seen in a forward; pairs of linear
maps are listed in `PAIRS`. What is found or listed is only believed after a run of the real block with scales drawn at
random: if its output moves, some other reader, an activation function or a layout stands between, and there is no fold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.models.skeleton import Skeleton, is_norm, matrix_of

# Producer and reader, in one parent module; the producer's *last* rows make the reader's channels.
PAIRS = {
    "attention": (("v_proj", "o_proj"), ("v_proj", "dense"), ("v_proj", "out_proj"), ("qkv_proj", "o_proj"),
                  ("c_attn", "c_proj")),
    "mlp": (("up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("fc1", "fc2")),
}  # fmt: skip
# Relative change of a block's output under scales that are powers of two: none, but for norms that multiply by (1 + w).
MOVED, MOVED_ROUNDING = 1e-4, 0.02


@dataclass(frozen=True)
class Fold:
    """One place for scales.

    producer  parameter stem of the norm or linear map; offset: 1 for norms that multiply by (1 + weight) (Gemma), else 0
    readers   full names of the linear modules whose K columns are multiplied
    rows      None for a norm; else how many of the producer's last rows make the channels, in heads of `head` rows, each
              of which makes `repeat` heads of channels (grouped-query attention: those share their scales)
    """

    producer: str
    readers: tuple[str, ...]
    offset: float = 0.0
    rows: int | None = None
    head: int = 1
    repeat: int = 1

    def tied(self, x: Tensor, how: Literal["mean", "amax"]) -> Tensor:
        """A statistic of each channel [K], made the same for channels that must share a scale."""
        if self.repeat == 1:
            return x
        heads = x.view(-1, self.repeat, self.head)
        pooled = heads.mean(1, keepdim=True) if how == "mean" else heads.amax(1, keepdim=True)
        return pooled.expand_as(heads).reshape(-1)

    def of_rows(self, s: Tensor) -> Tensor:
        """Scales of the channels [K] -> of the producer's rows."""
        return s.view(-1, self.repeat, self.head)[:, 0].reshape(-1)


def applied(
    fold: Fold, s: Tensor, weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters that change, by name, and the scales as they really became.

    weights: the block's parameters by name; modules: its linear modules. A norm's weight keeps its float type, so s is
    what that type makes of it; readers and producing rows come back in float32, exact until they are rounded.
    """
    changed: dict[str, Tensor] = {}
    if fold.rows is None:
        changed, s = _divided_norm(fold, s, weights)
    else:
        for leaf in ("weight", "bias"):
            name = f"{fold.producer}.{leaf}"
            if name in weights:
                changed[name] = _divided_rows(fold, s, weights[name], modules[fold.producer])
    for reader in fold.readers:
        name = f"{reader}.weight"
        columns = s if matrix_of(modules[reader], weights[name]) is weights[name] else s[:, None]
        changed[name] = weights[name].float() * columns
    return changed, s


def _divided_norm(fold: Fold, s: Tensor, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The norm's weight (and bias) over s, in their own type; s is then what the stored weight makes of it."""
    name, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
    before = weights[name].float() + fold.offset
    stored = (before / s - fold.offset).to(weights[name].dtype)
    after = stored.float() + fold.offset
    usable = (before != 0) & (after != 0)
    s = torch.where(usable, before / torch.where(usable, after, 1), torch.ones_like(s))
    changed = {name: torch.where(usable, stored, weights[name])}
    if bias in weights:
        changed[bias] = (weights[bias].float() / s).to(weights[bias].dtype)
    return changed, s


def _divided_rows(fold: Fold, s: Tensor, parameter: Tensor, module: nn.Module) -> Tensor:
    """A producing map's weight or bias, float32, with the last rows divided."""
    made = parameter.float().clone()
    matrix = made if made.ndim == 1 else matrix_of(module, made)  # a view: [N] or [N, K]
    divisor = fold.of_rows(s)
    matrix[len(matrix) - len(divisor) :] /= divisor if made.ndim == 1 else divisor[:, None]
    return made


# ------------------------------------------------------------------------------------------------------------- finding


@torch.no_grad()
def find_folds(skeleton: Skeleton, index: int, hidden: Tensor) -> list[Fold]:
    """The folds of block `index`, whose weights are loaded; hidden [B, T, H]: a batch it may be given."""
    observed, plain = _observe(skeleton, index, hidden)
    found = [*_norm_folds(skeleton, index, observed), *_row_folds(skeleton, index)]
    if _unmoved(skeleton, index, hidden, plain, found):
        return found
    return [fold for fold in found if _unmoved(skeleton, index, hidden, plain, [fold])]


@dataclass(frozen=True)
class _Observed:
    """In a forward: what each linear module read, and what each module with a weight vector gave."""

    read: dict[str, Tensor]
    gave: dict[str, Tensor]


def _observe(skeleton: Skeleton, index: int, hidden: Tensor) -> tuple[_Observed, Tensor]:
    """Run the block; also what it gives."""
    observed, hooks = _Observed({}, {}), []
    linears = skeleton.linears(index)
    for name, module in _named(skeleton, index):
        if name in linears:
            hooks.append(module.register_forward_pre_hook(lambda _, args, n=name: observed.read.update({n: args[0]})))
        elif is_norm(module):
            hooks.append(module.register_forward_hook(lambda _, __, out, n=name: observed.gave.update({n: out})))
    try:
        plain = skeleton.run(index, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return observed, plain


def _named(skeleton: Skeleton, index: int) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a block by full name."""
    prefix = f"{skeleton.block_prefix}.{index}"
    return ((f"{prefix}.{name}", module) for name, module in skeleton.blocks[index].named_modules() if name)


def _norm_folds(skeleton: Skeleton, index: int, observed: _Observed) -> list[Fold]:
    """Norms whose output is, memory for memory, what linear modules read."""
    folds = []
    for norm, out in observed.gave.items():
        readers = [name for name, x in observed.read.items() if _same(x, out)]
        if readers:
            offset = _offset(skeleton.model.get_submodule(norm), out)
            folds.append(Fold(norm, tuple(readers), offset))
    return folds


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _offset(norm: nn.Module, like: Tensor) -> float:
    """1 if the norm multiplies by (1 + weight): with a weight of zeros such a norm still gives something."""
    zeros = {name: torch.zeros_like(p) for name, p in norm.named_parameters(recurse=False)}
    ramp = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)[None, None]
    out = torch.func.functional_call(norm, zeros, (ramp,))
    return 1.0 if bool(out.any()) else 0.0


def _row_folds(skeleton: Skeleton, index: int) -> list[Fold]:
    """Pairs of linear modules as `PAIRS` lists them."""
    linears = skeleton.linears(index)
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    folds = []
    for kind, pairs in PAIRS.items():
        repeat = heads // groups if kind == "attention" else 1
        for producer, reader in _siblings(list(linears), pairs):
            N, K = _shape(linears[producer])[0], _shape(linears[reader])[1]
            head = K // heads if kind == "attention" else 1
            if K % (head * repeat) == 0 and K // repeat <= N:
                folds.append(Fold(producer, (reader,), rows=K // repeat, head=head, repeat=repeat))
    return folds


def _shape(linear: nn.Module) -> torch.Size:
    """[N, K] of a linear module."""
    return matrix_of(linear, linear.get_parameter("weight")).shape


def _siblings(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Full names of both members of a pair, where both stand in one module."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for producer, reader in pairs:
            if leaf == producer and f"{parent}.{reader}" in names:
                yield name, f"{parent}.{reader}"


def _unmoved(skeleton: Skeleton, index: int, hidden: Tensor, plain: Tensor, folds: list[Fold]) -> bool:
    """Whether the block still gives `plain` when these folds take random powers of two."""
    linears = skeleton.linears(index)
    state = dict(skeleton.blocks[index].named_parameters())
    weights: dict[str, Tensor] = {f"{skeleton.block_prefix}.{index}.{name}": p.detach() for name, p in state.items()}
    own: dict[str, Tensor] = {}
    for i, fold in enumerate(folds):
        K = matrix_of(linears[fold.readers[0]], weights[f"{fold.readers[0]}.weight"]).shape[1]
        drawn = torch.randint(-1, 2, (K,), generator=torch.Generator().manual_seed(i)).to(hidden.device)
        s = fold.tied(torch.exp2(drawn.float()), "amax")
        changed, _ = applied(fold, s, {**weights, **own}, linears)
        own |= {name: tensor.to(skeleton.dtype) for name, tensor in changed.items()}
    after, before, given = (skeleton.stream(x).float() for x in (skeleton.run_with(index, hidden, own), plain, hidden))
    moved = (after - before).norm() / (before - given).norm().clamp(min=1e-30)
    return bool(moved < (MOVED_ROUNDING if any(fold.offset for fold in folds) else MOVED))
