"""A Decoder for models whose forward takes no cache of transformers': the whole text is read again for every token.

GPT-1 has no cache at all; XLM, XLNet, RWKV, xLSTM and the first MiniMax have one of their own. Given transformers' cache, most
of them ignore it, and would see the last token alone.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.errors import InputError
from bitwright.inference.decoder import OneByOne, Part
from bitwright.numerics.key_value_codes import KeyValueCodes


class WholeDecoder(OneByOne):
    """See `Decoder`. A sequence is its tokens. InputError for kv: there are no keys and values to round."""

    goes_back = True

    def __init__(
        self, model: PreTrainedModel, context: int = 1 << 20, *, slots: int = 1, kv: KeyValueCodes | None = None
    ) -> None:
        if kv is not None:
            message = f"models of type {model.config.model_type!r} keep no keys and values here"
            raise InputError(message, remedy="leave out --kv")
        self.model, self.context, self.slots = model, context, slots
        self.held = [torch.zeros(0, dtype=torch.long)] * slots

    def read_one(self, part: Part) -> Tensor:
        """See `OneByOne`."""
        ids = torch.cat([self.held[part.slot], part.ids])
        logits: Tensor = self.model(input_ids=ids[None], use_cache=False).logits
        self.held[part.slot] = ids
        return logits[0, -part.wanted :].float()

    def length(self, slot: int) -> int:
        """See `Decoder`."""
        return len(self.held[slot])

    def keep(self, slot: int, length: int) -> int:
        """See `Decoder`."""
        self.held[slot] = self.held[slot][:length]
        return self.length(slot)

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Decoder`."""
        self.held[target] = self.held[source][:length]
        return self.length(target)
