"""Hadamard rotations: orthogonal matrices of ±1/√n, which spread an outlier over all channels.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) rotates the residual stream; since the rotation is orthogonal it can be
folded into the weights, and the model's function stays the same. H₁ = 1, H₂ₙ = [[H, H], [H, −H]] / √2
(Sylvester) exists for powers of two; a length K that is none is rotated in blocks of the largest power of two that
divides it. With random signs, diag(±1) H, it is a *random* Hadamard rotation, with which no weight is aligned.
"""

import torch
from torch import Tensor

from bitwright.errors import SchemeError


def block_of(K: int) -> int:
    """The largest power of two that divides K: the block length in which K channels are rotated."""
    return K & -K


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] times diag(H, …, H), H [block, block] orthonormal and symmetric, in K log₂(block) additions a row.

    Its own inverse. Raises SchemeError if block is not a power of two that divides K.

    >>> hadamard(torch.tensor([2.0, 0, 0, 0]), 4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    K = x.shape[-1]
    if block < 1 or block & (block - 1) or K % block:
        remedy = "a power of two that divides K"
        raise SchemeError(f"no Hadamard rotation of {K} channels in blocks of {block}", remedy=remedy)
    y = x.float().reshape(-1, block)
    step = 1
    while step < block:
        pairs = y.view(len(y), -1, 2, step)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(len(y), block)
        step *= 2
    return (y / block**0.5).reshape(x.shape).to(x.dtype)


def random_signs(K: int, seed: int) -> Tensor:
    """K signs ±1, float32."""
    return torch.randint(0, 2, (K,), generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).float()


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """x [..., K] times R = diag(signs) diag(H, …, H): the random Hadamard rotation."""
    return hadamard(x.float() * signs.to(x.device), block_of(x.shape[-1])).to(x.dtype)
