"""Multi-head attention with dynamically quantized projections; scores, softmax and weighted sums stay in float."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitwright.errors import SchemeError
from bitwright.nn.dropin import Replacement
from bitwright.nn.layers import DynamicProduct
from bitwright.nn.recurrent import linear
from bitwright.nn.rounded import rounded_as, trained

Make = Callable[[nn.Linear, str], DynamicProduct]


class IntegerAttention(Replacement):
    """`torch.nn.MultiheadAttention` with four dynamically quantized projections, and the same call.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    in_proj_bias = None  # keeps torch's transformer layers off the fast path, which reads float weights directly

    def __init__(self, source: nn.MultiheadAttention, make: Make, *, where: str) -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn:
            remedy = "keep it in float"
            raise SchemeError("attention to added keys has no integer form here", where=where, remedy=remedy)
        self.describe(source)
        self.where, self.batch_first, self.num_heads = where, source.batch_first, source.num_heads
        self.q, self.k, self.v = (make(part, name) for name, part in zip("qkv", projections(source), strict=True))
        self.out_proj = make(source.out_proj, "out_proj")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [T, B, E] or [B, T, E] (batch_first) or [T, E]; masks as in torch -> (output, weights or None)."""
        single = query.ndim == 2
        inputs: tuple[Tensor, ...] = (query, key, value)
        if single:
            inputs = tuple(t[None] for t in inputs)
        elif not self.batch_first:
            inputs = tuple(t.transpose(0, 1) for t in inputs)
        q, k, v = (self.heads(project(x)) for project, x in zip((self.q, self.k, self.v), inputs, strict=True))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores + self.mask(scores, attn_mask, key_padding_mask)
        weights = scores.softmax(-1)
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        y = y[0] if single else y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights[0] if single else weights

    def heads(self, x: Tensor) -> Tensor:
        """Split into heads: [B, T, E] -> [B, heads, T, E / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def mask(self, scores: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """The sum of both masks, to be added to the scores [B, heads, T, S]: −∞ where a bool mask is True."""
        total = torch.zeros((), dtype=scores.dtype, device=scores.device)
        if attn_mask is not None:
            by_head = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            total = total + _numbers(by_head, scores.dtype)
        if padding is not None:
            total = total + _numbers(padding if padding.ndim == 2 else padding[None], scores.dtype)[:, None, None]
        return total


def projections(source: nn.MultiheadAttention) -> list[nn.Linear]:
    """The projections of queries, keys and values as Linears, with their fake quantization if they were trained with it."""
    E = source.embed_dim
    rows = [slice(i * E, i * E + E) for i in range(3)]
    biases = [None if source.in_proj_bias is None else source.in_proj_bias[part] for part in rows]
    if source._qkv_same_embed_dim:
        w, fake = trained(source, "in_proj_weight")
        parts = [(w[part], None if fake is None else fake.part(part)) for part in rows]
    else:
        parts = [trained(source, f"{name}_proj_weight") for name in "qkv"]
    return [rounded_as(linear(w, bias), fake) for (w, fake), bias in zip(parts, biases, strict=True)]


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as floats, −∞ where True, else 0; a float mask unchanged."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
