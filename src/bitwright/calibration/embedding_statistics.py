"""What a change of the embedding or of the output head costs: a Gram for each, so that both are rounded like any matrix.

The head reads its inputs, as every matrix does. An embedding reads nothing: its row is looked up. But a change e of a row
changes what the first block gives by J e, J being the block's derivative at that token, and E[Jᵀ J] takes the place of
the Gram: |J e|² = eᵀ Jᵀ J e. With random signs r in place of the outputs' directions, E[(Jᵀ r)(Jᵀ r)ᵀ] is that very
matrix (Hutchinson's estimator), one pass backward through one block. Measured on a small model it serves as well as the
derivative through the whole model (docs/log.md): a block that stands first makes the small numbers of an embedding large,
and what follows treats all directions much alike.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.calibration.observe import EarlyStop
from bitwright.calibration.statistics import Gram
from bitwright.models.skeleton import Skeleton

TOKENS = 16384  # are enough for a derivative
HEAD_SHARE = 0.8  # of a matrix that is both: the rest is the embedding's; by measurement, and flat around it


def observe_head(skeleton: Skeleton, hidden: Sequence[Tensor]) -> Inputs:
    """Statistics of what the output head is given behind the last block; the parameters outside must be loaded."""
    gathering = Gathering([skeleton.head_name], Gram(hidden[0].shape[-1], hidden[0].device))

    def observe_block(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gathering.update(args[0], None)
        raise EarlyStop

    handle = skeleton.model.get_output_embeddings().register_forward_pre_hook(observe_block)
    try:
        for batch in hidden:
            with suppress(EarlyStop):
                skeleton.head(batch)
    finally:
        handle.remove()
    return gathering.value()


def observe_embedding(skeleton: Skeleton, hidden: Sequence[Tensor]) -> Inputs:
    """E[Jᵀ J] of the first block, whose weights must be loaded, at the embedded tokens [B, T, H]."""
    generator = torch.Generator(hidden[0].device).manual_seed(0)
    gram = Gram(hidden[0].shape[-1], hidden[0].device)
    for batch in hidden:
        x = batch.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            out = skeleton.run_with(0, x, {})
        signs = torch.randint(0, 2, out.shape, generator=generator, device=out.device).to(out.dtype) * 2 - 1
        (gradient,) = torch.autograd.grad(out, x, signs)
        gram.update(gradient)
    return Inputs(("embedding",), gram.tokens, gram.value())


def summed_up(head: Inputs, embedding: Inputs) -> Inputs:
    """For a matrix that is the head and the embedding: the two Grams in their shares, after bringing them to one size."""
    assert head.gram is not None and embedding.gram is not None
    parts = ((head.gram, HEAD_SHARE), (embedding.gram, 1 - HEAD_SHARE))
    gram = sum((share * g / g.trace().clamp(min=torch.finfo(g.dtype).tiny) for g, share in parts), torch.zeros(()))
    return Inputs(head.names, head.tokens, gram)
