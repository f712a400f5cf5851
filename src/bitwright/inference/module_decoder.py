"""Any causal language model as a Decoder, through transformers' forward and its caches: one sequence after the other."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitwright.inference.decoder import OneByOne, Part
from bitwright.numerics.key_value_codes import KeyValueCodes, rotated

ARGUMENTS = ("past_key_values", "cache_params")  # the second in Mamba
POSITIONED = ("bamba",)  # these begin at position 0 if they are not told
STEPPING = ("falcon_mamba", "mamba")  # in transformers these go on from a state by one token alone
UNFIT = ("cpmant", "hrm_text", "recurrent_gemma")  # of which transformers' cache gives errors, or other logits


class ModuleDecoder(OneByOne):
    """See `Decoder`. kv: keys and values in few bits; None: in the model's type."""

    def __init__(
        self, model: PreTrainedModel, context: int = 1 << 20, *, slots: int = 1, kv: KeyValueCodes | None = None
    ) -> None:
        self.model, self.context, self.slots, self.kv = model, context, slots, kv
        self.takes = inspect.signature(model.forward).parameters
        self.caches = [self._empty() for _ in range(slots)]
        self.lengths, self.recent = [0] * slots, [0] * slots  # tokens held; of those, read last

    def read_one(self, part: Part) -> Tensor:
        """See `OneByOne`."""
        if self.lengths[part.slot] and self.model.config.model_type in STEPPING:
            each = [self._forward(part.slot, ids, 1) for ids in part.ids.split(1)]
            return torch.cat(each[-part.wanted :])
        return self._forward(part.slot, part.ids, part.wanted)

    def _forward(self, slot: int, ids: Tensor, wanted: int) -> Tensor:
        """Read tokens [T] behind those of a slot: logits [wanted, V]."""
        cache, held = self.caches[slot], self.lengths[slot]
        if held and self.goes_back:
            cache.crop(0)  # what was kept so that the last tokens could be taken back
        given = {name: cache for name in ARGUMENTS if name in self.takes}
        if self.model.config.model_type in POSITIONED:
            given["position_ids"] = torch.arange(held, held + len(ids))[None]
        out = self.model(input_ids=ids[None], use_cache=True, logits_to_keep=wanted, **given)
        self.lengths[slot], self.recent[slot] = held + len(ids), len(ids)
        return out.logits[0, -wanted:].float()

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
        if not any(cache.is_linear):
            cache.activate_past_recording()
        return cache


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model's forward goes on from transformers' cache: not if it has none, or one of its own."""
    takes = inspect.signature(model.forward).parameters
    fit = model._supports_default_dynamic_cache() and model.config.model_type not in UNFIT
    return bool(fit) and any(name in takes for name in ARGUMENTS)


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
