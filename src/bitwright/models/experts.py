"""Mixture of experts (MoE) with separate Linear modules for each expert, instead of transformers' fused parameters.

transformers fuses the matrices of all experts of a layer in one 3-D parameter. Engines read quantized experts one by one, and
each expert needs calibration statistics of its own, so a Skeleton has separate modules, named as in most checkpoints:
`experts.3.gate_proj`, `experts.3.up_proj`, `experts.3.down_proj`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint, TensorInfo

FIRST, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"
BIAS = "_bias"  # suffix of the fused parameter of biases
NORM = "post_expert_norm"
BLOCK = 32  # weights that share a scale in MXFP4
SCALED = (
    "Llama4TextExperts",
)  # called with E copies of the tokens, one for each expert, already multiplied by the routing weights


@dataclass(frozen=True)
class Fused:
    """The layout of a transformers module of fused experts.

    E, I, H       number of experts, intermediate size of each, hidden size
    gated         whether experts have a gate: `gate_up_proj` rather than `up_proj`
    biased        whether experts have biases
    transposed    whether matrices are [E, K, N] rather than [E, N, K]
    concatenated  whether gate_up_proj has all rows of gate, then all of up; otherwise they are interleaved
    """

    E: int
    I: int  # noqa: E741
    H: int
    gated: bool
    biased: bool
    transposed: bool
    concatenated: bool

    @classmethod
    def of(cls, module: nn.Module) -> "Fused | None":
        """The layout of a module that fuses experts; None for any other."""
        own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        first = next((name for name in (FIRST, UP) if name in own), "")
        if not first or DOWN not in own or len(own[DOWN]) != 3:
            return None
        transposed = bool(getattr(module, "is_transposed", type(module).__name__ in SCALED))
        E, I, H = own[DOWN] if transposed else (own[DOWN][0], own[DOWN][2], own[DOWN][1])  # noqa: E741
        biased = DOWN + BIAS in own
        return cls(E, I, H, first == FIRST, biased, transposed, bool(getattr(module, "is_concatenated", True)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The fused parameters: name -> shape, with `transposed` taken into account."""
        first, N = (FIRST, 2 * self.I) if self.gated else (UP, self.I)
        matrices = {first: (N, self.H), DOWN: (self.H, self.I)}
        turned = {n: (self.E, *(shape[::-1] if self.transposed else shape)) for n, shape in matrices.items()}
        return turned | ({n + BIAS: (self.E, shape[0]) for n, shape in matrices.items()} if self.biased else {})

    @property
    def turned(self) -> "Fused":
        """The same experts, with the axes of every matrix swapped."""
        return replace(self, transposed=not self.transposed)

    def parts(self, fused: str) -> Iterator[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]]:
        """The parameters of one expert in a fused parameter: (name within the expert, shape, function that extracts it from
        the expert's slice)."""
        matrix, bias = fused.removesuffix(BIAS), fused.endswith(BIAS)
        N, K = (self.H, self.I) if matrix == DOWN else (self.I, self.H)
        halves = {matrix: slice(None)}
        if matrix == FIRST:
            both = (slice(N), slice(N, None)) if self.concatenated else (slice(0, None, 2), slice(1, None, 2))
            halves = dict(zip((GATE, UP), both, strict=True))
        for name, rows in halves.items():
            yield f"{name}.{'bias' if bias else 'weight'}", (N,) if bias else (N, K), partial(self._take, rows)

    def _take(self, rows: slice, one: Tensor) -> Tensor:
        """Some rows of one expert's slice of a fused parameter, as [N, K] or [N]."""
        return (one.T if self.transposed and one.ndim == 2 else one)[rows].contiguous()


class Expert(nn.Module):
    """One expert: down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, layout: Fused, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        I, H = layout.I, layout.H  # noqa: E741
        if layout.gated:
            self.gate_proj = nn.Linear(H, I, bias=layout.biased, device="meta")
        self.up_proj = nn.Linear(H, I, bias=layout.biased, device="meta")
        self.down_proj = nn.Linear(I, H, bias=layout.biased, device="meta")
        self.layout = layout
        self.act = act  # gated: [n, 2 I] of gate and up, in the model's layout, -> [n, I]; else the activation of up

    def inner(self, x: Tensor) -> Tensor:
        """The input of down_proj [n, I], for tokens x [n, H]."""
        if not self.layout.gated:
            return self.act(self.up_proj(x))
        both = (self.gate_proj(x), self.up_proj(x))
        return self.act(torch.cat(both, -1) if self.layout.concatenated else torch.stack(both, -1).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, H] -> [n, H]."""
        return self.down_proj(self.inner(x))


class Experts(nn.ModuleList):
    """The separate experts of a layer; replaces a transformers module of fused experts, with the same call."""

    def __init__(self, fused: Any, layout: Fused) -> None:
        for name in layout.shapes:
            del fused._parameters[name]
        norm = dict(fused.named_children()).get(NORM) if getattr(fused, "has_post_expert_norm", False) else None
        left = [n for n, _ in fused.named_parameters() if not (norm is not None and n.startswith(f"{NORM}."))]
        if left:
            kind = type(fused).__name__
            raise CheckpointError(f"experts of type {kind} also hold {left[0]}, which is not known here")
        own = getattr(fused, "_apply_gate", None) if layout.gated else fused.act_fn
        act = partial(_gated, fused.act_fn) if own is None else own
        super().__init__(Expert(layout, act) for _ in range(layout.E))
        self.layout = layout
        if norm is not None:
            self.add_module(NORM, norm)
        self.norm = norm

    def forward(self, hidden_states: Tensor, *routes: Tensor, **named: Tensor) -> Tensor:
        """Tokens [T, H], selected experts [T, k] and routing weights [T, k] -> [T, H].

        Llama 4: tokens [E·T, H], a copy for each expert, multiplied by its routing weights (zero if not selected) -> [E·T, H].
        """
        out = torch.zeros_like(hidden_states)
        for e, token, share in self.routed(hidden_states, *routes, *named.values()):
            given = self[e](hidden_states[token])
            given = given if self.norm is None else self.norm(given)
            out.index_add_(0, token, (given if share is None else given * share).to(out.dtype))
        return out

    def routed(self, hidden_states: Tensor, *routes: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """For each expert with tokens: (expert, indices of its tokens [n], routing weights [n, 1], or None for Llama 4)."""
        if not routes:
            each = len(hidden_states) // self.layout.E
            seen = hidden_states.view(self.layout.E, each, -1).any(-1)
            for e in seen.any(1).nonzero()[:, 0].tolist():
                yield e, seen[e].nonzero()[:, 0] + e * each, None
            return
        index, shares = routes
        for e in index.unique().tolist():
            if e < self.layout.E:  # index E marks a token without an expert
                token, at = torch.where(index == e)
                yield e, token, shares[token, at, None]


def _gated(act: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    """act(gate) · up. both: gate and up concatenated [n, 2 I] -> [n, I]."""
    gate, up = both.chunk(2, -1)
    return act(gate) * up


def one_by_one(model: nn.Module) -> dict[str, Fused]:
    """Replace all fused experts of a model by `Experts`, in place; module name -> former layout."""
    found = {name: layout for name, module in model.named_modules() if (layout := Fused.of(module)) is not None}
    for name, layout in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, Experts(model.get_submodule(name), layout))
    return found


def split(checkpoint: Checkpoint, source: str, name: str, fused: str, layout: Fused) -> None:
    """Replace a fused tensor in a checkpoint's table by one entry for each expert and matrix, named as in the Skeleton.

    source: the tensor; name: the experts' module; fused: the parameter of `layout` that it is. Nothing is read.

    CheckpointError if the tensor's shape does not fit the config.
    """
    info, meant = checkpoint.tensors[source], layout.shapes[fused]
    if info.shape != meant:
        message = f"tensor {source!r} has shape {info.shape}, config.json means {meant}: [experts, rows, columns]"
        remedy = "config.json and weights must belong together"
        raise CheckpointError(message, where=str(info.file), remedy=remedy)
    each = info.nbytes // layout.E
    del checkpoint.tensors[source]
    for e in range(layout.E):
        for leaf, shape, take in layout.parts(fused):
            at = info.offset + e * each
            checkpoint.tensors[f"{name}.{e}.{leaf}"] = TensorInfo(info.file, at, info.dtype, shape, meant[1:], take)


def split_blocks(checkpoint: Checkpoint, name: str, layout: Fused) -> None:
    """As `split`, for experts in MXFP4: fused tensors `_blocks` [E, N, K/32, 16] and `_scales` [E, N, K/32].

    Those of each expert get the suffixes `weight_blocks` and `weight_scales`. CheckpointError for other shapes.
    """
    rows_first = replace(layout, transposed=False)
    for fused, (E, N, K) in [item for item in rows_first.shapes.items() if len(item[1]) == 3]:
        for suffix, stored in (("blocks", (N, K // BLOCK, BLOCK // 2)), ("scales", (N, K // BLOCK))):
            info = checkpoint.tensors.pop(f"{name}.{fused}_{suffix}", None)
            if info is None:
                continue
            if info.shape != (E, *stored):
                message = f"tensor {name}.{fused}_{suffix} has shape {info.shape}, config.json means {(E, *stored)}"
                raise CheckpointError(message, where=str(info.file), remedy="get a good copy of the checkpoint")
            for e in range(E):
                at = info.offset + e * (info.nbytes // E)
                for leaf, shape, take in rows_first.parts(fused):
                    own = (shape[0], *stored[1:])
                    part = TensorInfo(info.file, at, info.dtype, own, stored, take)
                    checkpoint.tensors[f"{name}.{e}.{leaf}_{suffix}"] = part
