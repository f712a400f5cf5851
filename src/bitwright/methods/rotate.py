"""Rotations: rotate the residual stream so that no channel is an outlier, and undo it in the weights.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456). With R orthogonal, the residual stream h becomes h R: the embedding's rows
and every matrix that writes to the stream are multiplied by R on the output side, every matrix that reads it by Rᵀ on the
input side. An RMS norm commutes with R once its weights have been folded into the matrices behind it. The values of
attention are rotated head by head in the same way, between v_proj and o_proj. All that is exact and costs nothing at run
time. Only the input of down_proj, an elementwise product of activations, cannot be rotated beforehand: `online` rotates it
at run time, which the file format must be able to say.
"""

from dataclasses import dataclass

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.hadamard import block_of, hadamard, random_signs, rotated


@dataclass(frozen=True)
class Rotate:
    """Options of the rotation. seed: of the random signs; online: rotate the inputs of down_proj too, at run time."""

    seed: int = 0
    online: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.online, bool):
            raise RecipeError(f"online = {self.online!r}", remedy="online = true, or online = false")

    def reading(self, w: Tensor, norm: Tensor | None) -> Tensor:
        """A matrix [N, K] that reads the stream behind a norm of weights [K]: w diag(norm) R."""
        return rotated(w.float() if norm is None else w.float() * norm.float(), random_signs(w.shape[1], self.seed))

    def writing(self, w: Tensor) -> Tensor:
        """A matrix [N, K], or a bias [N], that writes to the stream, rotated on its output side."""
        signs = random_signs(w.shape[0], self.seed)
        return rotated(w.float().T, signs).T if w.ndim == 2 else rotated(w.float(), signs)

    def embedding(self, w: Tensor) -> Tensor:
        """Rows on the stream, rotated: an embedding table [V, H], or hidden states [..., H]."""
        return rotated(w.float(), random_signs(w.shape[-1], self.seed))


def by_heads(w: Tensor, head: int, *, rows: bool) -> Tensor:
    """Rotate the values of each head: rows of v_proj [N, K] (or its bias [N]), or columns of o_proj."""
    if rows and w.ndim == 2:
        return by_heads(w.T, head, rows=False).T
    return hadamard(w.float().reshape(*w.shape[:-1], -1, head), block_of(head)).reshape(w.shape)


def undone_online(w: Tensor) -> Tensor:
    """The matrix [N, K] for inputs that are rotated at run time, in blocks of `block_of(K)`."""
    return hadamard(w.float(), block_of(w.shape[1]))
