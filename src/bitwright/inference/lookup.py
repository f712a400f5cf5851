"""Embeddings of loaded models: `Lookup`, in the file's own bytes, decoded as tokens need them; `Table`, of floats."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def moved(t: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor where a conversion of the whole model takes it, in its own type."""
    found = fn(t)
    return found if found.dtype == t.dtype else t.to(found.device)


class Table(nn.Embedding):
    """ids [...] -> rows [..., H] of a float table [V, H], times `scale`. Frozen; an Embedding to those who look for such."""

    def __init__(self, rows: Tensor, scale: float = 1.0) -> None:
        V, H = rows.shape
        super().__init__(V, H, _weight=rows, _freeze=True)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        found = super().forward(input)
        return found if self.scale == 1 else found * self.scale


class Lookup(nn.Module):
    """ids [...] -> rows [..., H] of an embedding table [V, H] kept in the file's own bytes.

    rows    [V, ...] the table: bytes of blocks, which stay on the CPU, or numbers of another float type than the output's
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Conversions of the model, as by `.half()`, convert the output; the rows stay as they are."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(lambda t: moved(t, fn), recurse)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The whole table [V, H] in float, decoded; some models ask it where it lies."""
        return self.decode(self.rows).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The table under an embedding's usual name, or the file's own tensors of it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = {"weight": self.rows} if self.stored is None else self.stored()
        destination |= {f"{prefix}{suffix}": tensor for suffix, tensor in own.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float table in this one's place, as an adapter that trained the embedding brings it."""
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.is_floating_point():
            self.rows, self.decode, self.stored = given.detach(), lambda rows: rows, None
