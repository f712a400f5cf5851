"""KeyValueStore: the keys and values of several sequences, each layer's where a native step reads them, or in few bits."""

import torch
from torch import Tensor

from bitwright.numerics.key_value_codes import KeyValueCodes


class KeyValueStore:
    """Keys and values [slots, L, 2, key heads, context, D] in float16, or as rows of bytes in `codes`' format."""

    def __init__(
        self, slots: int, layers: int, key_heads: int, context: int, D: int, codes: KeyValueCodes | None
    ) -> None:
        width, dtype = (D, torch.float16) if codes is None else (codes.width(D), torch.uint8)
        self.rows = torch.zeros(slots, layers, 2, key_heads, context, width, dtype=dtype)
        self.codes, self.D = codes, D

    @property
    def rotates_keys(self) -> bool:
        """Whether keys are held rotated, so that queries must be rotated too."""
        return self.codes is not None and self.codes.rotates_keys

    def write(self, slot: int, layer: int, position: int, new: Tensor) -> None:
        """Put keys and values [2, key heads, T, D] of a layer at a position and behind it; keys rotated if they are held so."""
        rows = new if self.codes is None else self.codes.encode(new)
        self.rows[slot, layer, :, :, position : position + new.shape[2]] = rows

    def read(self, slots: list[int], layer: int, first: int, end: int) -> Tensor:
        """Keys and values float32 [2, B, key heads, S, D] of a layer's positions first … end − 1 in some sequences."""
        whole = self.rows[slots[0], layer][None] if len(slots) == 1 else self.rows[slots, layer]
        rows = whole[..., first:end, :].transpose(0, 1)
        return rows.float() if self.codes is None else self.codes.decode(rows, self.D)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one sequence to another."""
        if source != target:
            self.rows[target, ..., :length, :] = self.rows[source, ..., :length, :]
