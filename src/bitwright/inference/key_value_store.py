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

    def write(self, layer: int, slots: Tensor, positions: Tensor, new: Tensor) -> None:
        """Put keys and values [2, key heads, M, D] of a layer at the position [M] and in the sequence [M] of each."""
        rows = new if self.codes is None else self.codes.encode(new)
        self.rows[slots, layer, :, :, positions] = rows.permute(2, 0, 1, 3)

    def read(self, slots: list[int], layer: int, first: int, end: int) -> Tensor:
        """Keys and values float32 [2, B, key heads, S, D] of a layer's positions first … end − 1 in some sequences."""
        whole = self.rows[:, layer, :, :, first:end]
        rows = (whole[slots[0], None] if len(slots) == 1 else whole[slots]).transpose(0, 1)
        return rows.float() if self.codes is None else self.codes.decode(rows, self.D)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one sequence to another."""
        if source != target:
            self.rows[target, ..., :length, :] = self.rows[source, ..., :length, :]
