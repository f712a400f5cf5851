"""Prefill and decoding: in native code for models built like Llama, through the modules for all others.

A token's forward is a few hundred small operations; called one by one from Python they take as long as reading the weights, and
on a prompt every intermediate goes to memory and back. So for quantized Llama, Mistral, Qwen2 and Qwen3 the extension runs
whole blocks (csrc/runtime/decoder.cpp) on the tensors that the modules hold; for all others, and without the extension, the
modules run with transformers' cache. Both give the same logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from bitwright.errors import CheckpointError, InputError
from bitwright.inference.dense import Dense
from bitwright.inference.qlinear import QLinear
from bitwright.kernels import native
from bitwright.kernels.matmul import handles, matrix_of

Matrix = tuple[object, Tensor | None, Tensor | None]  # packed or float; its bias; the order of its inputs
Block = tuple[
    list[Matrix], tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]
]  # matrices; norms; norms of heads
TOKENS_AT_ONCE = 512  # of a prompt, so that activations stay small
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


class Decoder(Protocol):
    """A model with a KV cache of the tokens so far."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Clear the cache and read a prompt [T]: logits [V] for the token after it."""

    def step(self, token: int) -> Tensor:
        """Read one more token: logits [V] for the one after it."""


class ModuleDecoder:
    """Any causal language model, through transformers' forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(ids[None])

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """See `Decoder`."""
        return self._forward(torch.tensor([[token]]))

    def _forward(self, ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids.to(self.model.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[0, -1].float().cpu()


class NativeDecoder:
    """A model built like Llama in native code, except for the attention of many tokens at once, which is torch's.

    The KV cache is float16 [L, 2, key heads, room, D].
    """

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        """room: context length, the most tokens with the prompt included."""
        assert native is not None
        self.model, self.position, config = model, 0, model.config
        attention = model.model.layers[0].self_attn
        D, self.scaling, self.window = attention.head_dim, attention.scaling, _window(model) or 0
        self.cache = torch.zeros(config.num_hidden_layers, 2, config.num_key_value_heads, room, D, dtype=torch.float16)
        self.logits = torch.empty(config.vocab_size)
        cosine, sine = model.model.rotary_emb(torch.zeros(1, room, 1), torch.arange(room)[None])
        self.native = native.Decoder(
            [_layer(layer) for layer in model.model.layers],
            _weight(model.model, "norm"),
            _matrix(model.lm_head),
            cosine[0].contiguous(),
            sine[0].contiguous(),
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            D=D,
            window=self.window,
            epsilon=config.rms_norm_eps,
            scaling=self.scaling,
            bytes=_bits(model) // 8,
        )
        self.width = config.num_attention_heads * D

    def prefill(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        self.position = 0
        return self.extend(ids)

    @torch.no_grad()
    def extend(self, ids: Tensor) -> Tensor:
        """Read more tokens [T] behind those in the cache: logits [V] for the one after them."""
        self._check(self.position + len(ids))
        for part in ids.split(TOKENS_AT_ONCE):
            x = self._embedded(part)
            for layer in range(len(self.cache)):
                self._block(layer, x)
            self.position += len(part)
        self.native.finish(x[-1], self.logits, torch.get_num_threads())
        return self.logits.clone()

    def _block(self, layer: int, x: Tensor) -> None:
        """One block's forward on x [T, H], in place."""
        T, threads, end = len(x), torch.get_num_threads(), self.position + len(x)
        q = torch.empty(T, self.width)
        self.native.enter(layer, x, self.position, q, self.cache, threads)
        first = max(0, self.position - self.window + 1) if self.window else 0
        keys, values = self.cache[layer, :, :, first:end].float()
        mixed = nn.functional.scaled_dot_product_attention(
            q.view(1, T, -1, keys.shape[-1]).transpose(1, 2),
            keys[None],
            values[None],
            attn_mask=self._mask(first, end),
            is_causal=end == T and not self.window,
            scale=self.scaling,
            enable_gqa=True,
        )
        self.native.leave(layer, mixed[0].transpose(0, 1).reshape(T, -1), x, threads)

    def _mask(self, first: int, end: int) -> Tensor | None:
        """Attention mask [T, S] of the new tokens first..end; None: plain causal attention."""
        if not self.window and self.position == 0:
            return None
        back = torch.arange(self.position, end)[:, None] - torch.arange(first, end)[None]
        return (back >= 0) & (back < self.window) if self.window else back >= 0

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """See `Decoder`."""
        self._check(self.position + 1)
        x = self._embedded(torch.tensor([token]))[0]
        self.native.step(x, self.position, self.cache, self.logits, torch.get_num_threads())
        self.position += 1
        return self.logits.clone()

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(ids).to(torch.float32, copy=True)

    def _check(self, wanted: int) -> None:
        room = self.cache.shape[3]
        if wanted > room:
            message = f"{wanted} tokens in a context of {room}"
            raise InputError(message, remedy=f"give a shorter prompt, or --room {wanted} if the model reaches that far")


def decoder_of(model: PreTrainedModel, room: int) -> Decoder:
    """The fastest decoder for this model. room: context length, prompt included. CheckpointError for an encoder."""
    if not model.can_generate():
        message = f"models of type {model.config.model_type!r} predict no next token"
        raise CheckpointError(message, remedy="`bitwright.load` gives their hidden states")
    native_parts = model.device.type == "cpu" and _runs_natively(model)
    return NativeDecoder(model, room) if native_parts else ModuleDecoder(model)


def _runs_natively(model: PreTrainedModel) -> bool:
    """Whether the extension knows every part of the model."""
    config = model.config
    if native is None or config.model_type not in LIKE_LLAMA or config.hidden_act != "silu":
        return False
    if (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme"):
        return False
    layers = model.model.layers
    known = all(_is_known(layer.get_submodule(name)) for layer in layers for name in MATRICES)
    known = known and (isinstance(model.lm_head, Dense) or _is_known(model.lm_head))
    rotary = model.model.rotary_emb.rope_type != "dynamic" and layers[0].self_attn.head_dim % 16 == 0
    return known and rotary and config.intermediate_size % 16 == 0 and _window(model) is not None


def _is_known(matrix: nn.Module) -> bool:
    """Whether a module is a packed or float matrix without quantized activations of the file's own."""
    if not isinstance(matrix, QLinear) or matrix.outlier_columns is not None:
        return False
    plain = matrix.input_quantization.scheme is None and not matrix.input_quantization.rotate
    return plain and handles(matrix.packed, torch.empty(0))


def _window(model: PreTrainedModel) -> int | None:
    """The sliding window of attention in tokens, 0 for full attention; None: it differs between layers."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    width = getattr(model.config, "sliding_window", None)
    if model.config.model_type == "mistral":
        return width or 0
    if kinds == {"full_attention"}:
        return 0
    return width if kinds == {"sliding_attention"} else None


def _bits(model: PreTrainedModel) -> int:
    """Bits that inputs of packed matrices are rounded to."""
    return next((m.activations for m in model.modules() if isinstance(m, QLinear)), 16)


def _layer(layer: nn.Module) -> Block:
    """A block as the extension takes it."""
    q_norm, k_norm = (_weight(layer, f"self_attn.{name}") for name in ("q_norm", "k_norm"))
    before, after = _weight(layer, "input_layernorm"), _weight(layer, "post_attention_layernorm")
    assert before is not None
    assert after is not None
    return [_matrix(layer.get_submodule(name)) for name in MATRICES], (before, after), (q_norm, k_norm)


def _matrix(matrix: nn.Module) -> Matrix:
    """A matrix as the extension takes it."""
    assert isinstance(matrix, QLinear | Dense)  # see `_is_known`
    bias = None if matrix.bias is None else matrix.bias.detach().float().contiguous()
    if isinstance(matrix, Dense):
        return matrix.weight.detach(), bias, None
    return matrix_of(matrix.packed), bias, None if matrix.order is None else matrix.order.int()


def _weight(owner: nn.Module, name: str) -> Tensor | None:
    """The weight of a norm; None if there is no norm of that name."""
    found = dict(owner.named_parameters()).get(f"{name}.weight")
    return None if found is None else found.detach().float().contiguous()


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0; else drawn from the fewest that have probability top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top-p {self.top_p}", remedy="temperature from 0, top-p above 0 to 1"
            )

    def pick(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        kept = chances.cumsum(0) - chances < self.top_p  # the first always stays
        return int(order[torch.multinomial(chances * kept, 1, generator=generator)])


def tokens(decoder: Decoder, prompt: Tensor, *, most: int, stop: frozenset[int], sampling: Sampling) -> Iterator[int]:
    """Generate up to `most` tokens behind a prompt [T], without the stop token. InputError for an empty prompt."""
    if not len(prompt):
        raise InputError("an empty prompt", remedy="give at least one token")
    generator = torch.Generator().manual_seed(sampling.seed)
    logits = decoder.prefill(prompt)
    for left in range(most - 1, -1, -1):
        token = sampling.pick(logits, generator)
        if token in stop:
            return
        yield token
        if left:
            logits = decoder.step(token)
