"""The one loss: searches minimise it, tests check it, the planner spends by it, the report shows it."""

import torch
from torch import Tensor

CACHED = 1 << 17  # weights looked at together where a pass over memory is all it costs
PANEL = 1024  # columns of a symmetric matrix multiplied at a time
ROWS = 2048  # of the weight at a time: what lies between stays in the cache


def loss(w: Tensor, decoded: Tensor, gram: Tensor | None = None) -> float:
    """tr(E gram Eᵀ) / tr(w gram wᵀ) with E = w − decoded: the part of the layer's output energy that is lost.

    w, decoded [N, K]; gram as of `energy`. Unitless; 0 for an all-zero w.
    """
    return ratio(energy(w.float() - decoded.float(), gram), energy(w.float(), gram))


def energy(w: Tensor, gram: Tensor | None) -> Tensor:
    """w gram wᵀ of each row [N], float64: the mean squared output of each.

    gram [K, K], [K] for a diagonal one, or None for the identity. Both of one float type.
    """
    if gram is None or gram.ndim == 1:
        root = None if gram is None else gram.sqrt()
        parts = w.split(max(1, CACHED // w.shape[1]))
        norms = (part if root is None else part * root for part in parts)
        return torch.cat([torch.linalg.vector_norm(norm, dim=1, dtype=torch.float64) for norm in norms]).square()
    return torch.cat([_energy(rows, gram) for rows in w.split(ROWS)]).clamp(min=0)


def _energy(w: Tensor, gram: Tensor) -> Tensor:
    """w gram wᵀ of each of a few rows."""
    total = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for start in range(0, len(gram), PANEL):  # gram is symmetric: half of it, off-diagonal panels twice
        here = slice(start, start + PANEL)
        product = (w[:, start:] @ gram[start:, here]).float().mul_(2)
        product -= (w[:, here] @ gram[here, here]).float()
        total += product.mul_(w[:, here]).sum(1).double()
    return total


def ratio(lost: Tensor, whole: Tensor) -> float:
    """The share of the energy that is lost, over all rows; 0 where there was none."""
    total = float(whole.sum())
    return float(lost.sum()) / total if total > 0 else 0.0
