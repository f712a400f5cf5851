"""Keys and values in 8 bits, where a checkpoint says so (kv_cache_scheme): rounded on their way into transformers' caches."""

from typing import Any

from torch import Tensor, nn

from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.kv_cache import KvCache, KvRounding
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource, kv_rounding

CACHE = "past_key_values"  # what attention modules call it


def round_keys_and_values(skeleton: Skeleton, source: WeightSource | GgufWeightSource) -> None:
    """Let the model's attention modules round what they keep, each under the scales that the files have for it.

    CheckpointError as of `read_rounding`.
    """
    for index in range(len(skeleton)):
        name = skeleton.attention_name(index)
        rounding = None if name is None else kv_rounding(source, skeleton, name)
        if name is not None and rounding is not None:
            skeleton.model.get_submodule(name).register_forward_pre_hook(_Rounding(rounding), with_kwargs=True)


class _Rounding:
    """A hook that puts a cache that rounds in the place of the one that an attention module is handed."""

    def __init__(self, rounding: KvRounding) -> None:
        self.rounding = rounding

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inner = kwargs.get(CACHE)
        cache = KvCache(rounding=self.rounding) if inner is None else _Rounded(inner, self.rounding)
        return args, kwargs | {CACHE: cache}


class _Rounded:
    """One of transformers' caches, told of rounded keys and values."""

    def __init__(self, inner: Any, rounding: KvRounding) -> None:
        self.inner, self.rounding = inner, rounding

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees: all that is kept, these included."""
        updated: tuple[Tensor, Tensor] = self.inner.update(
            self.rounding[0](keys), self.rounding[1](values), *args, **kwargs
        )
        return updated

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
