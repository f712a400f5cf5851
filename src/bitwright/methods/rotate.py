"""Rotations: what blocks hand to one another is rotated, so that no channel is an outlier, and the weights undo it.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456). With R orthogonal, the residual stream h becomes h R: embeddings give it so,
every matrix that writes to it is multiplied by R on its output side, every matrix that reads it by Rᵀ on its input side.
An RMS norm commutes with R once its weights have moved into the matrices behind it. The values of attention are
rotated head by head in the same way, between their matrix and the output's. All that is exact and costs
nothing at run time. Only the input of the MLP's second matrix cannot be rotated beforehand, since a product of two
activations stands before it: `online` rotates it as it comes, which a format must be able to say.
"""

from dataclasses import dataclass

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.numerics.hadamard import block_of, hadamard, random_signs, rotated


@dataclass(frozen=True)
class Rotate:
    """seed: of the signs; online: also rotate the inputs of the MLP's second matrix, at run time."""

    seed: int = 0
    online: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.online, bool):
            raise RecipeError(f"online = {self.online!r}", remedy="true or false")

    def reading(self, w: Tensor, norm: Tensor | None) -> Tensor:
        """A matrix [N, K] that reads the stream behind a norm of weights [K]: diag(norm) taken in, then R."""
        return rotated(w.float() if norm is None else w.float() * norm.float(), random_signs(w.shape[1], self.seed))

    def writing(self, w: Tensor) -> Tensor:
        """A matrix [N, K], or a bias [N], that writes to the stream."""
        signs = random_signs(w.shape[0], self.seed)
        return rotated(w.float().T, signs).T if w.ndim == 2 else rotated(w.float(), signs)

    def embedding(self, w: Tensor) -> Tensor:
        """What is put on the stream: a table [V, H], or states [..., H]."""
        return rotated(w.float(), random_signs(w.shape[-1], self.seed))


def by_heads(w: Tensor, head: int, *, rows: bool) -> Tensor:
    """Rotate the values of each head: rows of the matrix that makes them [N, K] (or its bias [N]), or columns of its reader."""
    if rows and w.ndim == 2:
        return by_heads(w.T, head, rows=False).T
    return hadamard(w.float().reshape(*w.shape[:-1], -1, head), block_of(head)).reshape(w.shape)


def undone_online(w: Tensor) -> Tensor:
    """The matrix [N, K] for inputs that are rotated as they come, in blocks of `block_of(K)`."""
    return hadamard(w.float(), block_of(w.shape[1]))
