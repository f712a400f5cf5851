"""Base class of layers that hold integer weights: int8 in memory, which integer products read; packed in state dicts."""

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.nn.dropin import Replacement
from bitwright.nn.integer import IntegerWeight
from bitwright.numerics.packing import pack, unpack, words


class StoredCodes(Replacement):
    """A replacement with integer weights. In a state dict codes of fewer than 8 bits lie packed, as int32 words
    [N, ⌈K·bits / 32⌉] of unsigned codes, the lowest of which is 0; with keep_vars=True it holds the buffers themselves.

    codes  int8 [N, K]
    bits   of one code in a state dict
    """

    codes: Tensor
    bits: int

    def store(self, weight: IntegerWeight) -> None:
        """Register the codes of a weight."""
        self.bits = weight.bits
        self.register_buffer("codes", weight.values)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self._buffers.get("codes")
        if codes is not None and self.bits < 8 and not keep_vars and not codes.is_meta:
            destination[f"{prefix}codes"] = pack(codes.int() + self.zero, self.bits)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        name, codes = f"{prefix}codes", self._buffers.get("codes")
        stored = state_dict.get(name)
        if codes is not None and isinstance(stored, Tensor) and stored.dtype == torch.int32:
            expected = (len(codes), words(codes.shape[1], self.bits))
            if stored.shape != expected:
                message = f"packed codes of shape {list(stored.shape)}, not {list(expected)}"
                remedy = "load it into a module that was converted with the same schemes"
                raise CheckpointError(message, where=name, remedy=remedy)
            state_dict[name] = (unpack(stored, self.bits, codes.shape[1]).int() - self.zero).to(torch.int8)
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def zero(self) -> int:
        """The unsigned code of 0."""
        return 1 << (self.bits - 1)
