"""Observe the inputs of a block's matrices (forward hooks) while calibration tokens pass through it.

A block is observed in the order of its forward: o_proj's inputs once q, k and v are quantized, down_proj's once gate and
up are ("true sequential" in GPTQ's code). Methods whose target is the float model's output depend on it: if o_proj were
observed behind the float q, k and v, it would correct errors that q, k and v have already corrected; every block would
overshoot, and each more than the one before (docs/log.md).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.calibration.known_outputs import Enclosing, KnownOutputs
from bitwright.errors import BitwrightError
from bitwright.models.kv_cache import KvCache
from bitwright.models.layers import is_norm, matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.input_quantization import InputQuantization

SAME = 1e-2  # relative difference that the order of a sum may make in bfloat16
REACHED = 0.01  # of a norm's largest weight: channels with a smaller one are not corrected through
KEPT_BYTES = 512 << 20  # most bytes of a block's activations that are kept; more are computed anew for each group


class EarlyStop(Exception):  # noqa: N818
    """Raised by a hook that has what it needs, to skip the rest of the forward."""


@dataclass(frozen=True)
class Group:
    """Modules that read the very same tensor, by full name.

    behind  if the output is added to the residual stream: the modules of the block whose outputs were added before; else None
    norm    the RMS norm that the output passes before it is added (Gemma), or ""
    within  the module that returns the output as its own result
    """

    names: tuple[str, ...]
    behind: tuple[str, ...] | None = None
    norm: str = ""
    within: Enclosing | None = None


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer, by the full name of their module; names: of the matrices asked for."""

    name: str
    names: tuple[str, ...]


@dataclass
class BlockRun:
    """How block `index` is run: on the skeleton's weights, except for those that are replaced.

    weights              parameters to use instead, by name
    input_quantizations  how inputs are quantized before they are multiplied, by module name
    cache                the KV cache that receives the block's keys and values
    known                what some modules return for some inputs: they are not run again
    """

    skeleton: Skeleton
    index: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    input_quantizations: Mapping[str, InputQuantization | None] = field(default_factory=dict)
    cache: KvCache | None = None
    known: KnownOutputs = field(default_factory=lambda: KnownOutputs(0))

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]."""
        skeleton, known = self.skeleton, self.known.standing_in(self.skeleton.model, hidden)
        with skeleton.quantizing_inputs(self.input_quantizations), skeleton.caching(self.cache), known:
            return skeleton.run_with(self.index, hidden, self.weights)

    def settle(self, group: Group) -> None:
        """Note what the module around a quantized group returns for the inputs that `observe` has kept."""
        if group.within is not None:
            self.known.settle(group.within, lambda x: self._linear(group.names[0], x))

    @torch.no_grad()
    def _linear(self, name: str, x: Tensor) -> Tensor:
        """Output [..., N] of linear module `name` for x [..., K]."""
        own = {n.removeprefix(f"{name}."): w for n, w in self.weights.items() if n.startswith(f"{name}.")}
        with self.skeleton.quantizing_inputs({name: self.input_quantizations.get(name)}):
            out: Tensor = torch.func.functional_call(self.skeleton.model.get_submodule(name), own, (x,))
        return out

    def handed(self, hidden: Tensor, name: str) -> tuple[Tensor, ...]:
        """All that module `name` is called with, for hidden [B, T, H]; the rest is not computed."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            seen.extend([*args, *named.values()])
            raise EarlyStop

        self._stopped_at(name, keep, lambda: self(hidden))
        return tuple(seen)

    @torch.no_grad()
    def expert_inner(self, experts: str, e: int, x: Tensor) -> Tensor:
        """What down_proj of expert e reads [n, I], for its tokens x [n, H]."""
        name, seen = f"{experts}.{e}", list[Tensor]()
        own = {n.removeprefix(f"{name}."): w for n, w in self.weights.items() if n.startswith(f"{name}.")}
        expert = self.skeleton.model.get_submodule(name)

        def keep(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Tensor]) -> None:
            seen.append(args[0])
            raise EarlyStop

        some = {n: done for n, done in self.input_quantizations.items() if n.startswith(f"{name}.")}
        with self.skeleton.quantizing_inputs(some):
            self._stopped_at(f"{name}.down_proj", keep, lambda: torch.func.functional_call(expert, own, (x,)))
        return seen[0]

    def _stopped_at(self, name: str, keep: Callable[..., None], forward: Callable[[], Tensor]) -> None:
        """Run `forward` until module `name` is called; keep: a hook that sees with what, and raises EarlyStop."""
        hook = self.skeleton.model.get_submodule(name).register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
        try:
            with suppress(EarlyStop):
                forward()
        finally:
            hook.remove()

    def record(
        self, hidden: Tensor, inputs: Iterable[str], outputs: Iterable[str], *, whole: bool = False
    ) -> "Recorded":
        """Record inputs and outputs of these modules for hidden [B, T, H]; unless `whole`, stop the forward after the last.

        Modules that the forward does not reach are missing from the result.
        """
        seen, module = Recorded({}, self.known.of(hidden)), self.skeleton.model.get_submodule
        wanted = [(seen.inputs, name) for name in inputs] + [(seen.outputs, name) for name in outputs]

        def keep(into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
            into[name] = tensor
            if not whole and all(name in there for there, name in wanted):
                raise EarlyStop

        def returned(name: str, out: Any) -> None:
            seen.returned.setdefault(name, []).append(out)
            keep(seen.outputs, name, out[0] if isinstance(out, tuple) else out)

        hooks = [
            module(name).register_forward_pre_hook(lambda _, args, n=name: keep(seen.inputs, n, args[0]))
            if into is seen.inputs
            else module(name).register_forward_hook(lambda _, __, out, n=name: returned(n, out))
            for into, name in wanted
        ]
        try:
            with suppress(EarlyStop):
                seen.out = self(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return seen


@dataclass
class Recorded:
    """One batch: inputs and outputs of modules by name; the block's output, if it was run to its end.

    outputs: the tensor, or the first of a tuple; returned: what each call of a module has returned.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    out: Tensor | None = None
    returned: dict[str, list[Any]] = field(default_factory=dict)

    def residual(self, hidden: Tensor, group: Group) -> Tensor:
        """The residual stream [B, T, H], float32, to which the group's output is added; hidden: the block's input."""
        assert group.behind is not None
        return sum((self.outputs[name].float() for name in group.behind), hidden.float())


def _all_seen(unseen: set[str]) -> None:
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)


def groups_of(run: BlockRun, window: Tensor, wanted: Collection[str]) -> list[Group | Mixture]:
    """Group the modules `wanted` by their input, in the order of the forward; found by running window [1, T, H].

    BitwrightError for a module that the forward does not reach; experts count as reached.
    """
    mixtures = _mixtures(run, wanted)
    inside = {name for mixture in mixtures for name in mixture.names}
    linears, norms = [n for n in run.skeleton.linears(run.index) if n not in inside], _norms(run)
    read = [*(n for n in linears if n in wanted), *norms, *(mixture.name for mixture in mixtures)]
    seen = run.record(window, read, _modules(run), whole=True)
    _all_seen({n for n in wanted if n not in inside} - seen.inputs.keys())
    readers: dict[int, list[str]] = {}
    for name in linears:
        if name in wanted:
            readers.setdefault(id(seen.inputs[name]), []).append(name)
    order = {name: at for at, name in enumerate(seen.inputs)}
    assert seen.out is not None
    stream = run.skeleton.stream
    adding = {*linears, *norms, *(mixture.name.rpartition(".")[0] for mixture in mixtures)}
    outputs = {name: out for name, out in seen.outputs.items() if name in adding}
    written = _written(stream(window), stream(seen.out), outputs)
    groups = [_group(run, tuple(names), written, norms, seen) for names in readers.values()]
    first = {group.names[0]: group for group in groups} | {mixture.name: mixture for mixture in mixtures}
    return [first[name] for name in sorted(first, key=lambda name: order[name])]


def _mixtures(run: BlockRun, wanted: Collection[str]) -> list[Mixture]:
    """The layers of experts of the block that hold any of the modules `wanted`."""
    prefix, found = f"{run.skeleton.block_prefix}.{run.index}.", []
    for name in run.skeleton.experts:
        if name.startswith(prefix):
            names = tuple(n for n in run.skeleton.linears(run.index) if n in wanted and n.startswith(f"{name}."))
            found += [Mixture(name, names)] if names else []
    return found


def _norms(run: BlockRun) -> list[str]:
    """Names of the block's norms: modules with one weight vector."""
    prefix, named = f"{run.skeleton.block_prefix}.{run.index}.", run.skeleton.blocks[run.index].named_modules()
    return [prefix + name for name, module in named if name and is_norm(module)]


def _modules(run: BlockRun) -> list[str]:
    """Names of all modules of the block but those of single experts; containers among them are never called."""
    prefix, experts = f"{run.skeleton.block_prefix}.{run.index}.", tuple(f"{name}." for name in run.skeleton.experts)
    named = run.skeleton.blocks[run.index].named_modules(prefix=prefix[:-1])
    return [name for name, _ in named if name.startswith(prefix) and not name.startswith(experts)]


def _written(window: Tensor, out: Tensor, outputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Those of `outputs`, by module, which, added to the block's input, make its output; () if there are none such."""
    written = out.float() - window.float()
    candidates = [name for name, out in outputs.items() if out.shape == window.shape]
    for count in range(1, min(4, len(candidates)) + 1):
        for some in combinations(candidates, count):
            missing = written - sum((outputs[name].float() for name in some), torch.zeros(()))
            if float(missing.norm()) < SAME * float(written.norm()):
                return some
    return ()


def _group(
    run: BlockRun, names: tuple[str, ...], written: tuple[str, ...], norms: Sequence[str], seen: Recorded
) -> Group:
    """The group, with how its output reaches the residual stream, if it is one module."""
    if len(names) > 1:
        return Group(names)
    out, block = seen.outputs[names[0]], f"{run.skeleton.block_prefix}.{run.index}."
    alone = Group(names, within=Enclosing.of(names[0], seen.returned, block))
    if names[0] in written:
        return replace(alone, behind=written[: written.index(names[0])])
    norm = next((n for n in norms if n in written and seen.inputs[n] is out), "")
    if not norm:
        return alone
    meant = out.float() * _slope(run.skeleton, norm, out.float())
    moved = float((seen.outputs[norm].float() - meant).norm())
    same = moved < SAME * float(meant.norm())  # an RMS norm: no mean subtracted, no bias
    return replace(alone, behind=written[: written.index(norm)], norm=norm) if same else alone


def _slope(skeleton: Skeleton, norm: str, out: Tensor) -> Tensor:
    """γ / rms(out), by which an RMS norm multiplies out [..., H], with its epsilon; float32."""
    module = skeleton.model.get_submodule(norm)
    dtype, tiny = module.get_parameter("weight").dtype, torch.finfo(torch.float32).tiny
    with torch.no_grad():
        gamma = module(torch.ones(1, out.shape[-1], dtype=dtype, device=out.device)).float()
        scaled = gamma * out
        times = (module(out.to(dtype)).float() * scaled).sum(-1, keepdim=True)
    return gamma * (times / scaled.square().sum(-1, keepdim=True).clamp(min=tiny))


class FloatStream:
    """The float block on the float model's activations, beside the quantized model's.

    Its inputs and outputs are kept where they fit into `KEPT_BYTES`, since a block is observed once for each group; else
    they are computed anew each time, but for what its modules are known to return.
    """

    def __init__(self, run: BlockRun, batches: list[Tensor], stages: Sequence[Group | Mixture]) -> None:
        """run: the float block; batches [B, T, H]: what the float model gives it."""
        groups = [stage for stage in stages if isinstance(stage, Group)]
        self.run, self.batches = run, batches
        linears = run.skeleton.linears(run.index)
        widths = [_shape(linears[group.names[0]])[1] for group in groups]
        tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
        fits = tokens * sum(widths) * batches[0].itemsize <= KEPT_BYTES
        self._kept = [self._record(batch, groups, whole=True) for batch in batches] if fits else None
        run.known.limit = 0 if fits or run.skeleton.hands_on else KEPT_BYTES

    def _record(self, batch: Tensor, groups: Sequence[Group], *, whole: bool = False) -> Recorded:
        outputs = {name for group in groups for name in group.behind or ()}
        return self.run.record(batch, [group.names[0] for group in groups], outputs, whole=whole)

    def of(self, b: int, group: Group) -> Recorded:
        """Batch b, recorded at least up to the group."""
        if self._kept is not None:
            return self._kept[b]
        seen = self._record(self.batches[b], [group])
        if group.within is not None:
            self.run.known.keep_input(self.batches[b], seen.inputs[group.names[0]])
        return seen

    def move_on(self) -> None:
        """Replace the batches by the block's outputs: the inputs of the next block."""
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
    """Statistics of the input of each group.

    given        the block's inputs, in batches [B, T, H]
    floats       the float model's activations, for drift and residual; None: neither
    by_residual  weigh each token's error by 1 / the size of the residual stream that it is added to: a norm reads that, and
                 a token with massive activations (arXiv:2402.17762) must not outweigh all others
    detailed     ranges, a sample and a histogram beside the Gram
    """
    expected = sum(batch.shape[0] * batch.shape[1] for batch in given)
    gatherings: dict[str, Gathering] = {}
    for b, batch in enumerate(given):
        seen = run.record(
            batch, [group.names[0] for group in groups], {n for group in groups for n in group.behind or ()}
        )
        _all_seen({group.names[0] for group in groups} - seen.inputs.keys())
        for group in groups:
            name = group.names[0]
            x = seen.inputs.pop(name)
            if b == 0:
                gatherings[name] = Gathering.of(x, detailed=detailed, expected=expected)
                gatherings[name].names += group.names
            if group.within is not None:
                run.known.keep_input(batch, x)
            other = None if floats is None else floats.of(b, group)
            ahead, counting = None, None
            if group.behind is not None and (other is not None or by_residual):
                stream = (
                    None
                    if other is None or floats is None
                    else other.residual(run.skeleton.stream(floats.batches[b]), group)
                )
                pair = None if other is None or stream is None else (stream, other.inputs[name])
                ahead, counting = _towards(
                    run.skeleton, group, x, seen.residual(run.skeleton.stream(batch), group), pair
                )
            original = None if other is None else other.inputs[name]
            gatherings[name].update(x, original, ahead, counting if by_residual else None)
    return [gathering.value() for gathering in gatherings.values()]


def _towards(
    skeleton: Skeleton, group: Group, x: Tensor, stream: Tensor, float_pair: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor]:
    """What the output should add to its float value to correct the stream [B, T, N]; the weight of each token's error [B, T].

    x: the input; stream: the residual stream; float_pair: both in the float model, the stream first.
    """
    name = group.names[0]
    out = _product(skeleton, name, x)
    slope = _slope(skeleton, group.norm, out) if group.norm else torch.ones(())
    counting = 1 / (stream + out * slope).square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if group.norm:
        counting = counting / out.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if float_pair is None:
        return None, counting
    if not group.norm:
        return float_pair[0] - stream, counting
    meant = _product(skeleton, name, float_pair[1])
    ahead = (float_pair[0] + meant * _slope(skeleton, group.norm, meant) - stream) / slope - meant
    reached = slope.abs() > REACHED * slope.abs().amax(-1, keepdim=True)
    return ahead.where(reached, torch.zeros(())), counting


def _product(skeleton: Skeleton, name: str, x: Tensor) -> Tensor:
    """Output of module `name` for x [..., K] on the skeleton's weights: [..., N] float32."""
    module = skeleton.model.get_submodule(name)
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return functional.linear(x, matrix_of(module, module.get_parameter("weight")), bias).float()


def _shape(module: torch.nn.Module) -> torch.Size:
    """[N, K] of a linear module."""
    return matrix_of(module, module.get_parameter("weight")).shape
