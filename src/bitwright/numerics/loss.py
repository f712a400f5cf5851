"""The relative output error of a quantized matrix: searches minimise it, guards compare it, reports show it."""

import torch
from torch import Tensor

CACHED = 1 << 17  # weights at a time where memory bandwidth is the limit: they stay in the cache
PANEL = 1024  # columns of the Gram multiplied at a time
ROWS = 2048  # rows of the weight at a time: the products stay in the cache


def loss(w: Tensor, decoded: Tensor, gram: Tensor | None = None) -> float:
    """tr(E gram Eᵀ) / tr(w gram wᵀ) with E = w − decoded: squared error of the layer's outputs, relative to the outputs.

    w, decoded [N, K]; gram as of `energy`. Unitless; 0 for an all-zero w.
    """
    return ratio(energy(w.float() - decoded.float(), gram), energy(w.float(), gram))


def energy(w: Tensor, gram: Tensor | None) -> Tensor:
    """Mean squared output of each row, wₙ gram wₙᵀ: [N] float64.

    w [N, K]; gram [K, K], its diagonal [K], or None for the identity; both of one float type.
    """
    if gram is None or gram.ndim == 1:
        root = None if gram is None else gram.sqrt()
        parts = w.split(max(1, CACHED // w.shape[1]))
        norms = (part if root is None else part * root for part in parts)
        return torch.cat([torch.linalg.vector_norm(norm, dim=1, dtype=torch.float64) for norm in norms]).square()
    return torch.cat([_energy(rows, gram) for rows in w.split(ROWS)]).clamp(min=0)


def _energy(w: Tensor, gram: Tensor) -> Tensor:
    """The same for a few rows and a full Gram."""
    total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for start in range(0, len(gram), PANEL):  # gram is symmetric: what lies below its diagonal counts twice
        here, below = slice(start, start + PANEL), slice(start + PANEL, None)
        product = (w[:, here] @ gram[here, here]).float()
        if start + PANEL < len(gram):
            product += (w[:, below] @ gram[below, here]).float().mul_(2)
        total += product.mul_(w[:, here]).sum(1).double()
    return total


def ratio(lost: Tensor, whole: Tensor) -> float:
    """Energy of the errors over that of the outputs, both [N], summed over rows; 0 where the outputs are 0."""
    total = float(whole.sum())
    return float(lost.sum()) / total if total > 0 else 0.0
