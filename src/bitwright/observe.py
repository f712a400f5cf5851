"""Watch the inputs of a block's matrices while calibration tokens pass through it.

A block is observed in the order of its forward: o_proj's inputs once q, k and v are quantized, down_proj's once gate and
up are. For GPTQ this is the "true sequential" order. Methods that aim at the float model's outputs cannot do without it:
were o_proj observed behind the float q, k and v, it would make up for errors that these, once quantized, have made up for
already; every block would overshoot, and the next one more (docs/LOG.md).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.errors import BitwrightError
from bitwright.inputs import Gathering, Inputs
from bitwright.intake import Intake
from bitwright.kv import KvCache
from bitwright.models import Skeleton, matrix_of

SAME = 1e-2  # relative difference that bfloat16 may cause between two orders of one sum
KEPT_BYTES = 512 << 20  # of the float model's activations in a block; where there are more, they are computed anew


class Enough(Exception):  # noqa: N818
    """Raised by a hook that has seen what it wanted: what the model would do with it is of no interest."""


@dataclass(frozen=True)
class Group:
    """Modules that are handed the very same tensor, by full name.

    behind: where the output is added to the residual stream, the modules of the block whose outputs have been added to it
    before; None: it goes elsewhere.
    """

    names: tuple[str, ...]
    behind: tuple[str, ...] | None = None


@dataclass
class BlockRun:
    """Block `index` as it is run: on the weights that the skeleton holds, but for some.

    weights: parameters that are replaced, by name; intakes: what is done to the inputs of modules before they multiply;
    cache: is handed the block's keys and values.
    """

    skeleton: Skeleton
    index: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    intakes: Mapping[str, Intake | None] = field(default_factory=dict)
    cache: KvCache | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]."""
        with self.skeleton.taking_in(self.intakes), self.skeleton.caching(self.cache):
            return self.skeleton.run_with(self.index, hidden, self.weights)

    def record(
        self, hidden: Tensor, inputs: Iterable[str], outputs: Iterable[str], *, whole: bool = False
    ) -> "Recorded":
        """What these modules are handed and give, for hidden [B, T, H]; without `whole`, the rest is not computed."""
        seen, modules = Recorded({}, {}), self.skeleton.linears(self.index)
        wanted = [(seen.inputs, name) for name in inputs] + [(seen.outputs, name) for name in outputs]

        def keep(into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
            into[name] = tensor
            if not whole and all(name in there for there, name in wanted):
                raise Enough

        hooks = [
            modules[name].register_forward_pre_hook(lambda _, args, n=name: keep(seen.inputs, n, args[0]))
            if into is seen.inputs
            else modules[name].register_forward_hook(lambda _, __, out, n=name: keep(seen.outputs, n, out))
            for into, name in wanted
        ]
        try:
            with suppress(Enough):
                seen.out = self(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        _all_seen({name for into, name in wanted if name not in into})
        return seen


@dataclass
class Recorded:
    """Of one batch: what modules were handed, what modules gave, by name; what the block gave, if it was run to its end."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    out: Tensor | None = None

    def residual(self, hidden: Tensor, group: Group) -> Tensor:
        """The residual stream [B, T, H], float32, before the group's output is added; hidden: what the block was given."""
        assert group.behind is not None
        return sum((self.outputs[name].float() for name in group.behind), hidden.float())


def _all_seen(unseen: set[str]) -> None:
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)


def groups_of(run: BlockRun, window: Tensor, wanted: Collection[str]) -> list[Group]:
    """The modules `wanted`, in the order of the forward; window [1, T, H]: what the block is given to find out.

    BitwrightError for a module that is not reached.
    """
    linears = run.skeleton.linears(run.index)
    modules = [name for name in linears if name in wanted]
    seen = run.record(window, modules, linears, whole=True)
    readers: dict[int, list[str]] = {}
    for name, tensor in seen.inputs.items():
        readers.setdefault(id(tensor), []).append(name)
    writers = _writers(window, seen)
    return [Group(tuple(names), _behind(names, writers)) for names in readers.values()]


def _writers(window: Tensor, seen: Recorded) -> tuple[str, ...]:
    """The modules whose outputs, added to what the block is given, are what it gives; none if there are no such modules."""
    assert seen.out is not None
    written = seen.out.float() - window.float()
    candidates = [name for name, out in seen.outputs.items() if out.shape == window.shape]
    for count in range(1, min(4, len(candidates)) + 1):
        for some in combinations(candidates, count):
            missing = written - sum((seen.outputs[name].float() for name in some), torch.zeros(()))
            if float(missing.norm()) < SAME * float(written.norm()):
                return some
    return ()


def _behind(names: Sequence[str], writers: tuple[str, ...]) -> tuple[str, ...] | None:
    return writers[: writers.index(names[0])] if len(names) == 1 and names[0] in writers else None


class FloatStream:
    """What the float model's block makes of its own activations, beside what the quantized model's does.

    Kept where it fits into `KEPT_BYTES`, since a block is observed once for each group; else computed anew each time.
    """

    def __init__(self, run: BlockRun, batches: list[Tensor], groups: Sequence[Group]) -> None:
        """run: the float block; batches [B, T, H]: what the float model gives it."""
        self.run, self.batches = run, batches
        linears = run.skeleton.linears(run.index)
        widths = [_shape(linears[group.names[0]])[1] for group in groups]
        tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
        fits = tokens * sum(widths) * batches[0].itemsize <= KEPT_BYTES
        self._kept = [self._record(batch, groups, whole=True) for batch in batches] if fits else None

    def _record(self, batch: Tensor, groups: Sequence[Group], *, whole: bool = False) -> Recorded:
        outputs = {name for group in groups for name in group.behind or ()}
        return self.run.record(batch, [group.names[0] for group in groups], outputs, whole=whole)

    def of(self, b: int, group: Group) -> Recorded:
        """Batch b as far as the group."""
        return self._kept[b] if self._kept is not None else self._record(self.batches[b], [group])

    def move_on(self) -> None:
        """Replace the batches by what the block makes of them."""
        for b, batch in enumerate(self.batches):
            out = None if self._kept is None else self._kept[b].out
            self.batches[b] = self.run(batch) if out is None else out
        self._kept = None


def observe(
    run: BlockRun,
    given: Sequence[Tensor],
    groups: Sequence[Group],
    floats: FloatStream | None = None,
    *,
    by_residual: bool = False,
    detailed: bool = False,
) -> list[Inputs]:
    """Statistics of what the modules of each group are handed; given: what the block is, in batches [B, T, H].

    floats: the float model's stream, if it is to be compared.
    by_residual: where the output is added to the residual stream, an error counts by its size beside the stream that it ends
    up in, as what reads that is a norm: so a massive activation (arXiv:2402.17762) outweighs no other token.
    detailed: ranges, a sample and a histogram beside the Gram.
    """
    expected = sum(batch.shape[0] * batch.shape[1] for batch in given)
    gatherings: dict[str, Gathering] = {}
    for b, batch in enumerate(given):
        seen = run.record(
            batch, [group.names[0] for group in groups], {n for group in groups for n in group.behind or ()}
        )
        for group in groups:
            name = group.names[0]
            x = seen.inputs.pop(name)
            if b == 0:
                gatherings[name] = Gathering.of(x, detailed=detailed, expected=expected)
                gatherings[name].names += group.names
            original, ahead, counting = None, None, None
            if floats is not None:
                other = floats.of(b, group)
                original = other.inputs[name]
                if group.behind is not None:
                    ahead = other.residual(floats.batches[b], group) - seen.residual(batch, group)
            if by_residual and group.behind is not None:
                after = seen.residual(batch, group) + _product(run.skeleton, name, x)
                counting = 1 / after.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
            gatherings[name].update(x, original, ahead, counting)
    return [gathering.value() for gathering in gatherings.values()]


def _product(skeleton: Skeleton, name: str, x: Tensor) -> Tensor:
    """What module `name` makes of x [..., K] on the weight that the skeleton holds [..., N], less its bias; float32."""
    module = skeleton.model.get_submodule(name)
    return functional.linear(x, matrix_of(module, module.get_parameter("weight"))).float()


def _shape(module: torch.nn.Module) -> torch.Size:
    """[N, K] of a linear module."""
    return matrix_of(module, module.get_parameter("weight")).shape
