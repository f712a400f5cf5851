"""Folds: places in a block that can take channel scales without changing what it computes; found, then tested.

Linear modules (*readers*) read an input x [T, K] from a *producer*: a norm, whose weight multiplies each channel, or another
linear module, whose rows make the channels. In a mixture of experts the router and the gate and up of every expert read one
norm, whichever tokens each is handed. Dividing the producer's output by s [K] and multiplying the readers' columns by
s leaves the function as it was, for any s. Norms are found in a forward; pairs of linear modules are listed in `PAIRS`. Each
is tested by running the block with random scales: if its output changes, something else reads the channels, or an
activation function or another layout lies between, and there is no fold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.gguf.layer_values import of_layer
from bitwright.models.experts import DOWN, Experts
from bitwright.models.layers import is_norm, matrix_of
from bitwright.models.skeleton import Skeleton

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
    """A place for channel scales.

    producer  parameter name of the norm or linear module, without ".weight"
    readers   full names of the linear modules (and routers) whose K columns are multiplied
    offset    1 for norms that multiply by (1 + weight) (Gemma), else 0
    rows      None for a norm; else how many of the producer's last rows make the channels, in heads of `head` rows, each
              read by `repeat` heads of channels (grouped-query attention: those share their scales)
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
        """Scales of the channels [K] -> scales of the producer's rows."""
        return s.view(-1, self.repeat, self.head)[:, 0].reshape(-1)


def applied(
    fold: Fold, s: Tensor, weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], Tensor]:
    """Changed parameters by name, and the scales [K] actually applied.

    weights: the block's parameters by name; modules: from `readers_of`. A norm's weight keeps its float type, so s is
    rounded to what that type can hold; readers and producing rows come back in float32.
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
    """The norm's weight (and bias) divided by s, in their own type, and s as the stored weight has it."""
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
    """A producing linear module's weight or bias, float32, its last rows divided by s."""
    made = parameter.float().clone()
    matrix = made if made.ndim == 1 else matrix_of(module, made)  # a view: [N] or [N, K]
    divisor = fold.of_rows(s)
    matrix[len(matrix) - len(divisor) :] /= divisor if made.ndim == 1 else divisor[:, None]
    return made


# ------------------------------------------------------------------------------------------------------------- finding


def readers_of(skeleton: Skeleton, index: int) -> dict[str, nn.Module]:
    """The modules of block `index` that may read a fold's channels, by name: linear ones, and routers, which may be none."""
    prefix, get = f"{skeleton.block_prefix}.{index}.", skeleton.model.get_submodule
    return skeleton.linears(index) | {name: get(name) for name in skeleton.routers() if name.startswith(prefix)}


@torch.no_grad()
def find_folds(skeleton: Skeleton, index: int, hidden: Tensor) -> list[Fold]:
    """The folds of block `index`, whose weights must be loaded; hidden [B, T, H]: a batch of its inputs."""
    observed, plain = _observe(skeleton, index, hidden)
    found = [*_norm_folds(skeleton, index, observed), *_row_folds(skeleton, index)]
    if _unmoved(skeleton, index, hidden, plain, found):
        return found
    proved = [fold for fold in found if _unmoved(skeleton, index, hidden, plain, [fold])]
    moved = {_alike(skeleton, fold) for fold in found if fold not in proved}
    return [fold for fold in proved if _alike(skeleton, fold) not in moved]


def _alike(skeleton: Skeleton, fold: Fold) -> str:
    """The producer's name, without the expert's number: of experts only those that the batch's tokens reach are tested."""
    for experts in skeleton.experts:
        if fold.producer.startswith(f"{experts}."):
            return f"{experts}.{fold.producer.removeprefix(experts).partition('.')[2].partition('.')[2]}"
    return fold.producer


@dataclass(frozen=True)
class _Observed:
    """From one forward: inputs of linear modules, routers and mixtures of experts; outputs of norms (weight: a vector)."""

    read: dict[str, Tensor]
    gave: dict[str, Tensor]


def _observe(skeleton: Skeleton, index: int, hidden: Tensor) -> tuple[_Observed, Tensor]:
    """Run the block and observe it; also its output."""
    observed, hooks = _Observed({}, {}), []
    readers = readers_of(skeleton, index)
    for name, module in _named(skeleton, index):
        if name in readers or isinstance(module, Experts):
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
    """Norms whose output is the very tensor that linear modules read (same memory), not cut into heads in between."""
    folds = []
    for norm, out in observed.gave.items():
        read = [name for name, x in observed.read.items() if _same(x, out)]
        readers = [reader for name in read for reader in _matrices(skeleton, name)]
        if readers:
            offset = _offset(skeleton.model.get_submodule(norm), out)
            folds.append(Fold(norm, tuple(readers), offset))
    return folds


def _matrices(skeleton: Skeleton, name: str) -> list[str]:
    """The modules whose columns are an observed module's channels: itself; of a mixture, the gate and up of all experts."""
    module = skeleton.model.get_submodule(name)
    if not isinstance(module, Experts):
        return [name]
    inside = (n for n, m in module.named_modules(prefix=name) if isinstance(m, nn.Linear))
    return [n for n in inside if not n.endswith(f".{DOWN}")]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


def _offset(norm: nn.Module, like: Tensor) -> float:
    """1 if the norm multiplies by (1 + weight): with a weight of zeros its output is not zero."""
    zeros = {name: torch.zeros_like(p) for name, p in norm.named_parameters(recurse=False)}
    ramp = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)[None, None]
    out = torch.func.functional_call(norm, zeros, (ramp,))
    return 1.0 if bool(out.any()) else 0.0


def _row_folds(skeleton: Skeleton, index: int) -> list[Fold]:
    """Pairs of linear modules as `PAIRS` lists them."""
    linears = skeleton.linears(index)
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    groups = of_layer(config, "num_key_value_heads", index) or heads
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
    """Full names of both members of a pair, wherever one module has both."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for producer, reader in pairs:
            if leaf == producer and f"{parent}.{reader}" in names:
                yield name, f"{parent}.{reader}"


def _unmoved(skeleton: Skeleton, index: int, hidden: Tensor, plain: Tensor, folds: list[Fold]) -> bool:
    """Whether the block's output is still `plain` with random powers of two in these folds."""
    modules = readers_of(skeleton, index)
    state = dict(skeleton.blocks[index].named_parameters())
    weights: dict[str, Tensor] = {f"{skeleton.block_prefix}.{index}.{name}": p.detach() for name, p in state.items()}
    own: dict[str, Tensor] = {}
    for i, fold in enumerate(folds):
        K = matrix_of(modules[fold.readers[0]], weights[f"{fold.readers[0]}.weight"]).shape[1]
        drawn = torch.randint(-1, 2, (K,), generator=torch.Generator().manual_seed(i)).to(hidden.device)
        s = fold.tied(torch.exp2(drawn.float()), "amax")
        changed, _ = applied(fold, s, {**weights, **own}, modules)
        own |= {name: tensor.to(skeleton.dtype) for name, tensor in changed.items()}
    after, before, given = (skeleton.stream(x).float() for x in (skeleton.run_with(index, hidden, own), plain, hidden))
    moved = (after - before).norm() / (before - given).norm().clamp(min=1e-30)
    return bool(moved < (MOVED_ROUNDING if any(fold.offset for fold in folds) else MOVED))
