"""Models built like Llama in native code, several sequences in one reading of the weights.

A token's forward is a few hundred small operations; called one by one from Python they take as long as reading the weights, and
on a prompt every intermediate goes to memory and back. So the extension runs all blocks in one call (csrc/runtime/decoder.cpp)
on the tensors that the modules hold: prompts and tokens of several sequences are the rows of one input, each at its own place
of its own sequence. What a row gives is the same, bit for bit, whichever rows are read with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.dense import Dense
from bitwright.inference.key_value_store import KeyValueStore
from bitwright.inference.qlinear import QLinear
from bitwright.kernels import native
from bitwright.kernels.matmul import handles, matrix_of
from bitwright.models.kv_cache import kv_cache_scheme
from bitwright.numerics.key_value_codes import KeyValueCodes

Matrix = tuple[object, Tensor | None, Tensor | None]  # packed or float; its bias; the order of its inputs
Block = tuple[
    list[Matrix], tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]
]  # matrices; norms; norms of heads
TOKENS_AT_ONCE = 512  # that go through the blocks together, so that activations stay small
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


class NativeDecoder(Decoder):
    """See `Decoder`. Keys and values are float16, or in `kv`'s few bits."""

    def __init__(
        self, model: PreTrainedModel, context: int, *, slots: int = 1, kv: KeyValueCodes | None = None
    ) -> None:
        """context: the most tokens of a sequence, with the prompt included."""
        self.model, self.context, self.slots, config = model, context, slots, model.config
        attention = model.model.layers[0].self_attn
        self.store = KeyValueStore(
            slots, config.num_hidden_layers, config.num_key_value_heads, context, attention.head_dim, kv
        )
        self.lengths = [0] * slots
        cosine, sine = model.model.rotary_emb(torch.zeros(1, context, 1), torch.arange(context)[None])
        assert native is not None
        self.native = native.Decoder(
            [_layer(layer) for layer in model.model.layers],
            _weight(model.model, "norm"),
            _matrix(model.lm_head),
            cosine[0].contiguous(),
            sine[0].contiguous(),
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            D=attention.head_dim,
            window=window_of(model) or 0,
            epsilon=config.rms_norm_eps,
            scaling=attention.scaling,
            bytes=_bits(model) // 8,
        )

    @property
    def goes_back(self) -> bool:
        """See `Decoder`."""
        return True

    def length(self, slot: int) -> int:
        """See `Decoder`."""
        return self.lengths[slot]

    def keep(self, slot: int, length: int) -> int:
        """See `Decoder`. Any length is possible."""
        self.lengths[slot] = min(length, self.lengths[slot])
        return self.lengths[slot]

    def copy(self, source: int, target: int, length: int) -> int:
        """See `Decoder`."""
        self.store.copy(source, target, length)
        self.lengths[target] = min(length, self.lengths[source])
        return self.lengths[target]

    @torch.no_grad()
    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Decoder`."""
        self.check(parts)
        behind: list[list[Tensor]] = [[] for _ in parts]
        for pieces in _grouped(parts, TOKENS_AT_ONCE):
            rows = self._blocks([(parts[i].slot, ids) for i, ids in pieces])
            for (i, _), own in zip(pieces, rows, strict=True):
                behind[i] = [*behind[i], own][-parts[i].wanted :]
        hidden = torch.cat([torch.cat(own)[-part.wanted :] for own, part in zip(behind, parts, strict=True)])
        logits = torch.empty(len(hidden), self.model.config.vocab_size)
        self.native.finish(hidden, logits, torch.get_num_threads())
        return list(logits.split([part.wanted for part in parts]))

    def _blocks(self, pieces: list[tuple[int, Tensor]]) -> tuple[Tensor, ...]:
        """Read tokens of some slots: their hidden states behind the last block."""
        x = self.model.model.embed_tokens(torch.cat([ids for _, ids in pieces])).to(torch.float32, copy=True)
        slots, places = list[int](), list[int]()
        for slot, ids in pieces:
            slots += [slot] * len(ids)
            places += range(self.lengths[slot], self.lengths[slot] + len(ids))
        self.native.read(
            x,
            torch.tensor(slots),
            torch.tensor(places),
            self.store.rows,
            bits=self.store.bits,
            threads=torch.get_num_threads(),
        )
        for slot, ids in pieces:
            self.lengths[slot] += len(ids)
        return x.split([len(ids) for _, ids in pieces])


def _grouped(parts: Sequence[Part], most: int) -> list[list[tuple[int, Tensor]]]:
    """The tokens of all parts in order, at most so many in a group: (index of the part, some of its ids)."""
    groups: list[list[tuple[int, Tensor]]] = [[]]
    room = most
    for i, part in enumerate(parts):
        ids = part.ids
        while len(ids):
            if not room:
                groups.append([])
                room = most
            groups[-1].append((i, ids[:room]))
            taken = min(room, len(ids))
            ids, room = ids[taken:], room - taken
    return groups


def runs_natively(model: PreTrainedModel) -> bool:
    """Whether the extension knows every part of the model."""
    config = model.config
    if (
        native is None
        or model.device.type != "cpu"
        or config.model_type not in LIKE_LLAMA
        or config.hidden_act != "silu"
    ):
        return False
    if kv_cache_scheme(getattr(config, "quantization_config", None) or {}):
        return False
    layers = model.model.layers
    known = all(_is_known(layer.get_submodule(name)) for layer in layers for name in MATRICES)
    head = model.lm_head
    known = known and ((isinstance(head, Dense) and head.input_quantization is None) or _is_known(head))
    rotary = model.model.rotary_emb.rope_type != "dynamic" and layers[0].self_attn.head_dim % 16 == 0
    return known and rotary and config.intermediate_size % 16 == 0 and window_of(model) is not None


def window_of(model: PreTrainedModel) -> int | None:
    """The sliding window of attention in tokens, 0 for full attention; None: it differs between layers."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    width = getattr(model.config, "sliding_window", None)
    if model.config.model_type == "mistral":
        return width or 0
    if kinds == {"full_attention"}:
        return 0
    return width if kinds == {"sliding_attention"} else None


def _is_known(matrix: nn.Module) -> bool:
    """Whether a module is a packed or float matrix without quantized activations of the file's own."""
    if not isinstance(matrix, QLinear) or matrix.outlier_columns is not None:
        return False
    plain = matrix.input_quantization.scheme is None and not matrix.input_quantization.rotate
    return plain and handles(matrix.packed, torch.empty(0))


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
