"""GPTAQ: GPTQ with the float model's outputs as its target (asymmetric calibration).

The blocks before a matrix are quantized, so its inputs X differ from the float model's X₀, while its outputs should be
X₀ wᵀ. And where its output is added to a residual stream R that differs from the float model's R₀, the sum should be
R₀ + X₀ wᵀ. The float matrix that comes nearest to that on X, by least squares, is

    v = w + (w (X₀ − X)ᵀX + (R₀ − R)ᵀX) (XᵀX + λ I)⁻¹

and rounding v against the Gram of X minimises ‖R + X ŵᵀ − R₀ − X₀ wᵀ‖² just as rounding w minimises ‖X (ŵ − w)ᵀ‖². Li et
al. 2025 (arXiv:2504.02692) fold the first correction into GPTQ's column loop; here both are made beforehand, exactly, and
any method can follow. λ keeps few calibration tokens from being overfitted. Statistics must be taken after all earlier
matrices, those of the same block included, were quantized: see calibration/observe.py.
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.gptq import gptq
from bitwright.methods.outcome import Outcome
from bitwright.numerics.scheme import Scheme


def gptaq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    drift: Tensor | None = None,
    residual: Tensor | None = None,
    damping: float = 0.01,
    correction_damping: float = 1.0,
    sweeps: int | None = None,
    pruned: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """Round w [N, K] so that its outputs on X come near to the float model's on X₀.

    w, gram             as for `gptq`; gram is that of X
    drift               [K, K] = (X₀ − X)ᵀX / T; None: X = X₀, and this is `gptq`
    residual            [N, K] = (R₀ − R)ᵀX / T; None: R = R₀, or the output is added to no residual stream
    correction_damping  λ, as a share of the Gram's mean diagonal
    damping, sweeps, pruned, fast  as for `gptq`
    """
    target = w if drift is None or gram is None else corrected(w, gram, drift, correction_damping, residual)
    return gptq(target, gram, scheme, damping=damping, sweeps=sweeps, pruned=pruned, fast=fast)


def corrected(w: Tensor, gram: Tensor, drift: Tensor, damping: float, residual: Tensor | None = None) -> Tensor:
    """The corrected weights v [N, K] of the module's docstring; w itself if the damped Gram has no Cholesky factor."""
    if not damping > 0:
        remedy = "options = { correction_damping = 1.0 }"
        raise RecipeError(f"correction_damping {damping} must be above 0", remedy=remedy)
    matrix = w.reshape(w.shape[0], -1).float()
    H = gram.clone()
    H.diagonal().add_(max(damping * float(gram.diagonal().mean()), torch.finfo(H.dtype).tiny))
    factor, failed = torch.linalg.cholesky_ex(H)
    if failed:
        return w
    missing = matrix @ drift if residual is None else torch.addmm(residual, matrix, drift)
    return (matrix + torch.cholesky_solve(missing.T, factor).T).reshape(w.shape)
