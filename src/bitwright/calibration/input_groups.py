"""Which modules of a block read the very same tensor, and how what they give reaches the residual stream: found by a run.

Modules that share an input share its statistics. Where an output is added to the residual stream, errors count by their share
of it; which outputs those are is found by adding up what the modules give.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from bitwright.calibration.block_run import BlockRun, Recorded, check_reached
from bitwright.calibration.known_outputs import Enclosing
from bitwright.models.layers import is_norm
from bitwright.models.skeleton import Skeleton

SAME = 1e-2  # relative difference that the order of a sum may make in bfloat16


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


def groups_of(run: BlockRun, window: Tensor, wanted: Collection[str]) -> list[Group | Mixture]:
    """Group the modules `wanted` by their input, in the order of the forward; found by running window [1, T, H].

    BitwrightError for a module that the forward does not reach; experts count as reached.
    """
    mixtures = _mixtures(run, wanted)
    inside = {name for mixture in mixtures for name in mixture.names}
    linears, norms = [n for n in run.skeleton.linears(run.index) if n not in inside], _norms(run)
    read = [*(n for n in linears if n in wanted), *norms, *(mixture.name for mixture in mixtures)]
    seen = run.record(window, read, _modules(run), whole=True)
    check_reached({n for n in wanted if n not in inside} - seen.inputs.keys())
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
    meant = out.float() * norm_slope(run.skeleton, norm, out.float())
    moved = float((seen.outputs[norm].float() - meant).norm())
    same = moved < SAME * float(meant.norm())  # an RMS norm: no mean subtracted, no bias
    return replace(alone, behind=written[: written.index(norm)], norm=norm) if same else alone


def norm_slope(skeleton: Skeleton, norm: str, out: Tensor) -> Tensor:
    """γ / rms(out), by which an RMS norm multiplies out [..., H], with its epsilon; float32."""
    module = skeleton.model.get_submodule(norm)
    dtype, tiny = module.get_parameter("weight").dtype, torch.finfo(torch.float32).tiny
    with torch.no_grad():
        gamma = module(torch.ones(1, out.shape[-1], dtype=dtype, device=out.device)).float()
        scaled = gamma * out
        times = (module(out.to(dtype)).float() * scaled).sum(-1, keepdim=True)
    return gamma * (times / scaled.square().sum(-1, keepdim=True).clamp(min=tiny))
