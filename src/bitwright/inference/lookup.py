"""Lookup: an embedding whose rows stay in the file's bytes and are decoded when a token needs them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Lookup(nn.Module):
    """ids [...] -> rows [..., H] of an embedding table [V, H] kept in the file's own bytes.

    rows    [V, ...] the table: bytes of blocks, which stay on the CPU, or float numbers
    decode  some of its rows -> float [n, H]
    dtype   of the output
    scale   what rows are multiplied by
    stored  gives the file's tensors of the table by suffix, for `state_dict`; None: it is one tensor, the rows
    """

    rows: Tensor

    def __init__(
        self,
        rows: Tensor,
        decode: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        *,
        width: int,
        scale: float = 1.0,
        stored: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("rows", rows, persistent=False)
        self.decode, self.dtype, self.scale = decode, dtype, scale
        self.num_embeddings, self.embedding_dim = len(rows), width

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]; a row that occurs several times is decoded once."""
        wanted, place = ids.unique(return_inverse=True)
        found = self.decode(self.rows[wanted.to(self.rows.device)]).to(ids.device, self.dtype)
        return (found if self.scale == 1 else found * self.scale)[place]

    @property
    def weight(self) -> Tensor:
        """The whole table [V, H] in float, decoded; some models ask it where it lies."""
        return self.decode(self.rows).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The table under an embedding's usual name, or the file's own tensors of it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = {"weight": self.rows} if self.stored is None else self.stored()
        destination |= {f"{prefix}{suffix}": tensor for suffix, tensor in own.items()}
