"""KeyValueStore: the keys and values of several sequences where the native decoder reads them, in float16 or in few bits."""

import torch

from bitwright.numerics.key_value_codes import KeyValueCodes


class KeyValueStore:
    """Keys and values [slots, L, 2, key heads, context, D] in float16, or as rows of bytes in `codes`' format."""

    def __init__(
        self, slots: int, layers: int, key_heads: int, context: int, D: int, codes: KeyValueCodes | None
    ) -> None:
        width, dtype = (D, torch.float16) if codes is None else (codes.width(D), torch.uint8)
        self.rows = torch.zeros(slots, layers, 2, key_heads, context, width, dtype=dtype)
        self.bits = 16 if codes is None else codes.bits  # of a number

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one sequence to another."""
        if source != target:
            self.rows[target, ..., :length, :] = self.rows[source, ..., :length, :]
