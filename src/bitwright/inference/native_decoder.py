"""Models built like Llama in native code, several sequences in one reading of the weights.

A token's forward is a few hundred small operations; called one by one from Python they take as long as reading the weights, and
on a prompt every intermediate goes to memory and back. So the extension runs whole blocks (csrc/runtime/decoder.cpp) on the
tensors that the modules hold. One token of one sequence is one call. Everything else, prompts and tokens of several sequences,
goes through the matrices as rows of one input, each row at its own position; the attention of each sequence is torch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.dense import Dense
from bitwright.inference.key_value_store import KeyValueStore
from bitwright.inference.qlinear import QLinear
from bitwright.kernels import native
from bitwright.kernels.matmul import handles, matrix_of
from bitwright.numerics.key_value_codes import KeyValueCodes, rotated

if TYPE_CHECKING:
    from bitwright import _native

Matrix = tuple[object, Tensor | None, Tensor | None]  # packed or float; its bias; the order of its inputs
Block = tuple[
    list[Matrix], tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]
]  # matrices; norms; norms of heads
TOKENS_AT_ONCE = 512  # that go through the blocks together, so that activations stay small
SHORT = 16  # tokens of a sequence up to which its attention is computed together with that of others
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """Tokens of one sequence among the rows of an input: rows first … last − 1, positions from `position` on."""

    slot: int
    position: int
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def end(self) -> int:
        return self.position + self.count


@dataclass(frozen=True)
class _Together:
    """Short runs whose attention is one product. mask [B, 1, 1, T, S]: what each of T queries sees; T, S: the most of any."""

    runs: list[_Run]
    rows: Tensor  # [B, T]: the row of each query; a shorter run's last one is repeated
    own: Tensor  # [B, T]: whether it is not such a repetition
    mask: Tensor
    end: int


class NativeDecoder(Decoder):
    """See `Decoder`. Keys and values are float16, or in `kv`'s few bits."""

    def __init__(
        self, model: PreTrainedModel, context: int, *, slots: int = 1, kv: KeyValueCodes | None = None
    ) -> None:
        """context: the most tokens of a sequence, with the prompt included."""
        self.model, self.context, self.slots, config = model, context, slots, model.config
        attention = model.model.layers[0].self_attn
        self.D, self.scaling, self.window = attention.head_dim, attention.scaling, window_of(model) or 0
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = config.num_hidden_layers
        self.store = KeyValueStore(slots, self.layers, self.key_heads, context, self.D, kv)
        self.lengths = [0] * slots
        cosine, sine = model.model.rotary_emb(torch.zeros(1, context, 1), torch.arange(context)[None])
        self.tables = cosine[0].contiguous(), sine[0].contiguous()
        # Of rows at any positions: the tables hold what belongs to each row, the keys and values are taken from here at once.
        self.row_tables = torch.empty(TOKENS_AT_ONCE, self.D), torch.empty(TOKENS_AT_ONCE, self.D)
        blocks = [_layer(layer) for layer in model.model.layers]
        self.lone, self.many = self._native(blocks, self.tables), self._native(blocks, self.row_tables)

    def _native(self, blocks: list[Block], tables: tuple[Tensor, Tensor]) -> "_native.Decoder":
        assert native is not None
        return native.Decoder(
            blocks,
            _weight(self.model.model, "norm"),
            _matrix(self.model.lm_head),
            *tables,
            heads=self.heads,
            key_heads=self.key_heads,
            D=self.D,
            window=self.window,
            epsilon=self.model.config.rms_norm_eps,
            scaling=self.scaling,
            bytes=_bits(self.model) // 8,
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
        if len(parts) == 1 and len(parts[0].ids) == 1 and self.store.codes is None:
            return [self._step(parts[0])]
        behind: list[list[Tensor]] = [[] for _ in parts]
        for pieces in _grouped(parts, TOKENS_AT_ONCE):
            x = self._embedded(torch.cat([ids for _, ids in pieces]))
            self._blocks([(parts[i].slot, len(ids)) for i, ids in pieces], x)
            for (i, _), rows in zip(pieces, x.split([len(ids) for _, ids in pieces]), strict=True):
                behind[i] = [*behind[i], rows][-parts[i].wanted :]
        hidden = [torch.cat(rows)[-part.wanted :] for rows, part in zip(behind, parts, strict=True)]
        return list(self._logits(torch.cat(hidden)).split([part.wanted for part in parts]))

    def _step(self, part: Part) -> Tensor:
        """One token of one sequence: logits [1, V]."""
        logits = torch.empty(self.model.config.vocab_size)
        cache, position = self.store.rows[part.slot], self.lengths[part.slot]
        self.lone.step(self._embedded(part.ids)[0], position, cache, logits, torch.get_num_threads())
        self.lengths[part.slot] += 1
        return logits[None]

    def _blocks(self, lengths: list[tuple[int, int]], x: Tensor) -> None:
        """Let rows x [M, H] through all blocks, in place: so many of each slot, one after the other."""
        runs, first = [], 0
        for slot, T in lengths:
            runs.append(_Run(slot, self.lengths[slot], first, first + T))
            first += T
        positions = torch.cat([torch.arange(run.position, run.end) for run in runs])
        slots = torch.cat([torch.full((run.count,), run.slot) for run in runs])
        for table, row_table in zip(self.tables, self.row_tables, strict=True):
            row_table[: len(x)] = table[positions]
        together, threads = self._together(runs), torch.get_num_threads()
        new = torch.empty(self.layers, 2, self.key_heads, len(x), self.D, dtype=torch.float16)
        q = torch.empty(len(x), self.heads * self.D)
        for layer in range(self.layers):
            self.many.enter(layer, x, 0, q, new, threads)
            queries, fresh = q.view(len(x), self.heads, self.D), new[layer]
            if self.store.rotates_keys:
                queries, fresh = rotated(queries), torch.stack([rotated(fresh[0].float()), fresh[1].float()])
            self.store.write(layer, slots, positions, fresh)
            mixed = self._attention(layer, queries, runs, together)
            self.many.leave(layer, mixed.flatten(1), x, threads)
        for run in runs:
            self.lengths[run.slot] = run.end

    def _attention(self, layer: int, q: Tensor, runs: list[_Run], together: list[_Together]) -> Tensor:
        """Queries [M, heads, D] -> what attention mixes of the values that each sees [M, heads, D]."""
        mixed = torch.empty_like(q)
        for group in together:
            self._short(layer, q, group, mixed)
        for run in runs:
            if run.count > SHORT:
                mixed[run.first : run.last] = self._long(layer, q[run.first : run.last], run)
        return mixed

    def _long(self, layer: int, q: Tensor, run: _Run) -> Tensor:
        """Attention of many tokens of one sequence [T, heads, D]."""
        first = max(0, run.position - self.window + 1) if self.window else 0
        keys, values = self.store.read([run.slot], layer, first, run.end)
        from_start = run.position == 0 and not self.window
        back = torch.arange(run.position, run.end)[:, None] - torch.arange(first, run.end)
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=None if from_start else self._seen(back),
            is_causal=from_start,
            scale=self.scaling,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1)

    def _short(self, layer: int, q: Tensor, group: _Together, mixed: Tensor) -> None:
        """Attention of the runs of a group, into their rows of mixed."""
        keys, values = self.store.read([run.slot for run in group.runs], layer, 0, group.end)
        B, T = group.rows.shape
        queries = q[group.rows.flatten()].view(B, T, self.key_heads, -1, self.D).permute(0, 2, 3, 1, 4)
        scores = queries.flatten(2, 3) @ keys.transpose(-1, -2) * self.scaling
        weights = scores.view(*queries.shape[:4], -1).masked_fill_(~group.mask, -torch.inf).softmax(-1)
        found = (weights.flatten(2, 3) @ values).view(queries.shape).permute(0, 3, 1, 2, 4)
        mixed[group.rows[group.own]] = found.reshape(B, T, self.heads, self.D)[group.own]

    def _together(self, runs: list[_Run]) -> list[_Together]:
        """Short runs in groups of about equal length of what they look back at, so that little is filled up."""
        groups: dict[int, list[_Run]] = {}
        for run in runs:
            if run.count <= SHORT:
                groups.setdefault(max(6, run.end.bit_length()), []).append(run)
        return [self._group(group) for group in groups.values()]

    def _group(self, runs: list[_Run]) -> _Together:
        T, end = max(run.count for run in runs), max(run.end for run in runs)
        steps = torch.arange(T)
        rows = torch.stack([run.first + steps.clamp(max=run.count - 1) for run in runs])
        own = torch.stack([steps < run.count for run in runs])
        at = torch.stack([run.position + steps.clamp(max=run.count - 1) for run in runs])
        back = at[:, :, None] - torch.arange(end)
        return _Together(runs, rows, own, self._seen(back)[:, None, None], end)

    def _seen(self, back: Tensor) -> Tensor:
        """Whether a token sees what lies so many positions back."""
        return (back >= 0) & (back < self.window) if self.window else back >= 0

    def _logits(self, x: Tensor) -> Tensor:
        """Logits [n, V] behind hidden states [n, H]."""
        if len(x) == 1:
            logits = torch.empty(self.model.config.vocab_size)
            self.many.finish(x[0], logits, torch.get_num_threads())
            return logits[None]
        return self.model.lm_head(self.model.model.norm(x)).float()

    def _embedded(self, ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(ids).to(torch.float32, copy=True)


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
    if (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme"):
        return False
    layers = model.model.layers
    known = all(_is_known(layer.get_submodule(name)) for layer in layers for name in MATRICES)
    known = known and (isinstance(model.lm_head, Dense) or _is_known(model.lm_head))
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
