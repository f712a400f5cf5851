"""Observe the inputs of a block's matrices (forward hooks) while calibration tokens pass through it.

A block is observed in the order of its forward: o_proj's inputs once q, k and v are quantized, down_proj's once gate and
up are ("true sequential" in GPTQ's code). Methods whose target is the float model's output depend on it: if o_proj were
observed behind the float q, k and v, it would correct errors that q, k and v have already corrected; every block would
overshoot, and each more than the one before (docs/log.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.calibration.block_run import BlockRun, Recorded, check_reached
from bitwright.calibration.input_groups import Group, Mixture, norm_slope
from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton

REACHED = 0.01  # of a norm's largest weight: channels with a smaller one are not corrected through
KEPT_BYTES = 512 << 20  # most bytes of a block's activations that are kept; more are computed anew for each group


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
        check_reached({group.names[0] for group in groups} - seen.inputs.keys())
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
                pair = None
                if other is not None and floats is not None:
                    stream = other.residual(run.skeleton.stream(floats.batches[b]), group.behind)
                    pair = stream, other.inputs[name]
                stream = seen.residual(run.skeleton.stream(batch), group.behind)
                ahead, counting = _towards(run.skeleton, group, x, stream, pair)
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
    slope = norm_slope(skeleton, group.norm, out) if group.norm else torch.ones(())
    counting = 1 / (stream + out * slope).square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if group.norm:
        counting = counting / out.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if float_pair is None:
        return None, counting
    if not group.norm:
        return float_pair[0] - stream, counting
    meant = _product(skeleton, name, float_pair[1])
    ahead = (float_pair[0] + meant * norm_slope(skeleton, group.norm, meant) - stream) / slope - meant
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
