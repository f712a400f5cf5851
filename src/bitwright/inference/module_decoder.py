"""Any causal language model as a Decoder, through transformers' forward and its caches: one sequence after the other."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitwright.inference.decoder import Decoder, Part
from bitwright.numerics.key_value_codes import KeyValueCodes, rotated


class ModuleDecoder(Decoder):
    """See `Decoder`. kv: keys and values in few bits; None: in the model's type."""

    def __init__(
        self, model: PreTrainedModel, context: int = 1 << 20, *, slots: int = 1, kv: KeyValueCodes | None = None
    ) -> None:
        self.model, self.context, self.slots, self.kv = model, context, slots, kv
        self.caches = [self._empty() for _ in range(slots)]
        self.lengths, self.recent = [0] * slots, [0] * slots  # tokens held; of those, read last

    @torch.no_grad()
    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Decoder`."""
        self.check(parts)
        return [self._one(part) for part in parts]

    def _one(self, part: Part) -> Tensor:
        cache = self.caches[part.slot]
        if self.lengths[part.slot]:
            cache.crop(0)  # what was kept so that the last tokens could be taken back
        out = self.model(input_ids=part.ids[None], past_key_values=cache, use_cache=True, logits_to_keep=part.wanted)
        self.lengths[part.slot] += len(part.ids)
        self.recent[part.slot] = len(part.ids)
        return out.logits[0, -part.wanted :].float()

    @property
    def goes_back(self) -> bool:
        """See `Decoder`."""
        return not any(self.caches[0].is_linear)

    def length(self, slot: int) -> int:
        """See `Decoder`."""
        return self.lengths[slot]

    def keep(self, slot: int, length: int) -> int:
        """See `Decoder`. Windows and recurrent states go back as far as the last tokens read, full attention to any place."""
        back = self.lengths[slot] - length
        if back <= 0:
            return self.lengths[slot]
        reaches = back < self.recent[slot] or not any(self.caches[slot].is_sliding)
        if length and reaches and self.goes_back:
            self.caches[slot].crop(-back)
            self.lengths[slot], self.recent[slot] = length, 0
        else:
            self.caches[slot], self.lengths[slot], self.recent[slot] = self._empty(), 0, 0
        return self.lengths[slot]

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Decoder`."""
        self.caches[target] = copy.deepcopy(self.caches[source])
        self.lengths[target], self.recent[target] = self.lengths[source], self.recent[source]
        return self.keep(target, length)

    def _empty(self) -> DynamicCache:
        config = self.model.config
        cache = DynamicCache(config=config) if self.kv is None else _CodedCache(self.kv, config)
        cache.activate_past_recording()
        return cache


class _CodedCache(DynamicCache):  # type: ignore[misc]
    """transformers' cache with keys and values held as rows of bytes."""

    def __init__(self, kv: KeyValueCodes, config: Any) -> None:
        super().__init__(config=config)
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees: all that is kept, these included, [B, H, T, D]."""
        turns = self.kv.rotates_keys
        rows = self.kv.encode(rotated(key_states) if turns else key_states), self.kv.encode(value_states)
        keys, values = super().update(*rows, *args, **kwargs)
        keys, values = self.kv.decode(keys, key_states.shape[-1]), self.kv.decode(values, value_states.shape[-1])
        return (rotated(keys) if turns else keys).to(key_states.dtype), values.to(value_states.dtype)
