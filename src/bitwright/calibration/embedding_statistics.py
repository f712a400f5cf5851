"""A Gram for the embedding and one for the output head, so that both are rounded like any matrix.

The head's is the Gram of its inputs. An embedding has no inputs: rows are looked up. But an error e of a row changes the first
block's output by J e, J being the block's Jacobian at that token, so E[Jᵀ J] takes the place of the Gram: |J e|² = eᵀ Jᵀ J e.
With random signs r as output gradients, E[(Jᵀ r)(Jᵀ r)ᵀ] = E[Jᵀ J] (Hutchinson's estimator): one backward pass through one
block. On a small model the Jacobian of the first block served as well as that of the whole model (docs/log.md): the first
block amplifies the small numbers of an embedding, and the blocks after it treat all directions much alike.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from bitwright.calibration.block_run import EarlyStop
from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.calibration.statistics import Gram
from bitwright.models.skeleton import Skeleton

TOKENS = 16384  # that the embedding's Gram is taken of, at most
HEAD_SHARE = 0.8  # weight of the head's Gram where the two matrices are tied: by measurement, and flat around it


def observe_head(skeleton: Skeleton, hidden: Sequence[Tensor]) -> Inputs:
    """Statistics of the output head's inputs. hidden [B, T, H]: outputs of the last block; outer parameters must be loaded."""
    K = skeleton.model.get_parameter(f"{skeleton.head_name}.weight").shape[1]
    gathering = Gathering([skeleton.head_name], Gram(K, hidden[0].device))

    def observe_block(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        gathering.update(args[0], None)
        raise EarlyStop

    handle = skeleton.head_module.register_forward_pre_hook(observe_block)
    try:
        for batch in hidden:
            with suppress(EarlyStop):
                skeleton.head(batch)
    finally:
        handle.remove()
    return gathering.value()


def observe_embedding(skeleton: Skeleton, hidden: Sequence[Tensor]) -> Inputs:
    """E[Jᵀ J] of the first block at the embedded tokens [B, T, H]; the block's weights must be loaded.

    Of several hidden states and further inputs [B, T, W] (Gemma 3n), the first is the embedding itself.
    """
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same signs on every device
    K = skeleton.model.get_parameter(f"{skeleton.embedding_name}.weight").shape[1]
    gram = Gram(K, hidden[0].device)
    for batch in hidden:
        x = batch.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            out = skeleton.run_with(0, x, {})
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out.device, out.dtype) * 2 - 1
        (gradient,) = torch.autograd.grad(out, x, signs)
        gram.update(gradient[..., :K])
    return Inputs(("embedding",), gram.tokens, gram.value())


def summed_up(head: Inputs, embedding: Inputs) -> Inputs:
    """For tied matrices: the weighted mean of the two Grams, each divided by its trace."""
    assert head.gram is not None and embedding.gram is not None
    parts = ((head.gram, HEAD_SHARE), (embedding.gram, 1 - HEAD_SHARE))
    gram = sum((share * g / g.trace().clamp(min=torch.finfo(g.dtype).tiny) for g, share in parts), torch.zeros(()))
    return Inputs(head.names, head.tokens, gram)
