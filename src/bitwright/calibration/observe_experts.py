"""Statistics of what the experts of a layer are handed: each has its own, of the tokens that the router sends it.

All are taken of one record of what the layer is handed, so that the block is run once however many experts there are, and
memory is the statistics of one expert. An expert that few tokens reach is not judged by those alone: some of all tokens of
the layer are let through it too. Their weight together is `PRIOR` tokens, so its Gram is

    (n G_own + PRIOR G_all) / (n + PRIOR),    n: tokens of its own,

the mean of a prior that is worth so many tokens; without tokens of its own it is G_all. How `PRIOR` was chosen: docs/log.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.calibration.block_run import BlockRun
from bitwright.calibration.input_groups import Group, Mixture
from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.calibration.observe import FloatStream, observe
from bitwright.models.experts import DOWN, Experts
from bitwright.models.skeleton import TOKENS_PER_BATCH
from bitwright.system import distributed
from bitwright.system.memory import return_memory

PRIOR = 128.0  # tokens that all tokens of the layer count for beside an expert's own
SAMPLE = 1024  # tokens of the layer that stand for all of them
ENOUGH = 4  # tokens for each channel of its inputs: beyond that an expert is judged by its own alone


def statistics_in_order(
    run: BlockRun,
    given: Sequence[Tensor],
    stage: Group | Mixture,
    floats: FloatStream | None = None,
    *,
    detailed: bool = False,
    by_residual: bool = False,
) -> Iterator[Inputs]:
    """Statistics of one group of modules, or of experts one after the other: then each is taken when it is asked for, behind
    what `run` holds quantized by then. Arguments as of `observe`."""
    if isinstance(stage, Group):
        yield from observe(run, given, [stage], floats, by_residual=by_residual, detailed=detailed)
        return
    layer = _Layer.of(run, given, stage, floats, detailed)
    for e in range(layer.experts.layout.E):
        yield from layer.expert(e)


def _handed(run: BlockRun, batches: Sequence[Tensor], name: str, note: Callable[..., None] = lambda *_: None) -> Tensor:
    """What module `name` is called with first, for all batches [B, T, H] in one tensor; note: told of all its arguments.

    The tensor is filled batch by batch: joined in the end, it would be there twice for a moment.
    """
    tokens, joined, at = sum(batch.shape[:2].numel() for batch in batches), torch.empty(0), 0
    for batch in batches:
        one, *others = run.handed(batch, name)
        if at == 0:
            joined = one.new_empty(len(one) * tokens // batch.shape[:2].numel(), one.shape[1])
        joined[at : at + len(one)] = one
        note(one, *others)
        at += len(one)
    return joined


@dataclass(frozen=True)
class _Layer:
    """What a layer of experts is handed: tokens x [n, H], those of the float model in their place; whom each token goes to."""

    run: BlockRun
    float_run: BlockRun | None
    experts: Experts
    mixture: Mixture
    x: Tensor
    original: Tensor | None
    rows: dict[int, Tensor]
    pool: Tensor
    detailed: bool

    @classmethod
    def of(
        cls, run: BlockRun, given: Sequence[Tensor], mixture: Mixture, floats: FloatStream | None, detailed: bool
    ) -> "_Layer":
        """Run the block as far as its experts, on all batches."""
        experts = run.skeleton.model.get_submodule(mixture.name)
        assert isinstance(experts, Experts)
        rows, at, routed = dict[int, list[Tensor]](), 0, True

        def note(one: Tensor, *routes: Tensor) -> None:
            nonlocal at, routed
            routed = bool(routes)  # else x holds the tokens once for each expert, scaled: none is another's
            for e, token, _ in experts.routed(one, *routes):
                rows.setdefault(e, []).append(token + at)
            at += len(one)

        x = _handed(run, given, mixture.name, note)
        of_floats = floats if routed else None
        original = None if of_floats is None else _handed(of_floats.run, of_floats.batches, mixture.name)
        return_memory()  # what those forwards took
        seen = torch.arange(len(x), device=x.device) if routed else x.any(-1).nonzero()[:, 0]
        return cls(
            run, None if of_floats is None else of_floats.run, experts, mixture, x, original,
            {e: torch.cat(parts) for e, parts in rows.items()}, seen[:: max(1, len(seen) // SAMPLE)], detailed,
        )  # fmt: skip

    def expert(self, e: int) -> Iterator[Inputs]:
        """What gate and up of expert e read, and then what down reads."""
        own = self.rows.get(e, torch.empty(0, dtype=torch.long, device=self.x.device))
        tokens, pool = distributed.total(torch.tensor([len(own), len(self.pool)])).tolist()
        few = tokens < ENOUGH * self.x.shape[1]
        rows = torch.cat([own, self.pool]) if few else own
        counting = torch.ones(len(rows), device=self.x.device)
        counting[len(own) :] = PRIOR / max(1, pool)
        names = [name for name in self.mixture.names if name.startswith(f"{self.mixture.name}.{e}.")]
        for down in (False, True):
            some = tuple(name for name in names if name.endswith(f".{DOWN}") is down)
            if some:
                known = self._inputs(some, rows, counting, e if down else None)
                yield replace(known, tokens=tokens, borrowed=pool if few else 0)

    def _inputs(self, names: tuple[str, ...], rows: Tensor, counting: Tensor, inner: int | None) -> Inputs:
        """Statistics of the tokens `rows`, some at a time; inner: of what down_proj of that expert reads for them."""
        gathering = None
        for some, weights in zip(rows.split(TOKENS_PER_BATCH), counting.split(TOKENS_PER_BATCH), strict=True):
            x, original = self.x[some], None if self.original is None else self.original[some]
            if inner is not None:
                x = self.run.expert_inner(self.mixture.name, inner, x)
                if original is not None and self.float_run is not None:
                    original = self.float_run.expert_inner(self.mixture.name, inner, original)
            gathering = gathering or Gathering.of(x, detailed=self.detailed, expected=len(rows))
            gathering.update(x, original, None, weights)
        assert gathering is not None
        return replace(gathering.value(), names=names)
