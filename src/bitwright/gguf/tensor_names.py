"""Map parameter names between transformers and llama.cpp, and convert tensors where their layout differs.

llama.cpp permutes the rows of Llama's q and k so that the channels of a rotary pair are adjacent, stores Gemma's norm weights
as 1 + w, has no transposed matrices, and drops the first rows of RoBERTa's position embedding, which no text uses (RoBERTa
then is a BERT). A state space's A is stored as it is used, not as its logarithm. The experts of a layer are one tensor
[E, N, K], and their biases one [E, N]; here each expert has parameters of its own (models/experts.py); other parameters that
are not a tensor each: tensor_parts.py. The name table is the gguf package's. Source: llama.cpp's converter (conversion/*.py).
"""

import re
from contextlib import suppress
from math import prod

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf.config_keys import architecture_of, experts_in, first_position
from bitwright.gguf.gemma_keys import PER_LAYER
from bitwright.gguf.special_keys import falcon_kv_heads
from bitwright.gguf.tensor_parts import Part, Place, parts_of, share_of
from bitwright.numerics.qtensor import head_by_head, permuted, unpermuted

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D
TABLES = ("position_embd.weight", "token_types.weight")  # embeddings that are added, never used in a matrix product
POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # an encoder's, which llama.cpp does not use
HEADS = (
    "cls.",
    "lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
)  # heads of an encoder's pretraining tasks
POSITIONS = "position_embeddings.weight"
EXPERT = re.compile(r"\.(\d+)\.(?:.*\.)?experts\.(\d+)\.(gate|up|down)_proj\.(weight|bias)$")
# Routers, convolutions, and what a state space is made of.
FLOAT32 = (
    "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "exp_probs_b.bias", "ssm_conv1d.weight", "shortconv.conv.weight",
    "ssm_a", "ssm_d", "ssm_norm.weight",
)  # fmt: skip
RENAMED = {  # endings of parameters that the gguf package's table has otherwise
    "gate.moe_statics.e_score_correction_bias": "moe_statics.e_score_correction.bias",
    "e_score_correction_bias": "e_score_correction.bias",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "self_attn.sinks": "self_attn.sinks.weight",
    "dt_bias": "dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
    "correct_output_scale": "correct_output_scale.weight",
    "feed_forward.expert_bias": "feed_forward.expert_bias.bias",
}
ROOTS = {
    "nemotron_h": ("model.", "backbone.")
}  # what parameters' names begin with, and what in the gguf package's table
NUMBERS = ("act_fn.beta", "act_fn.eps")  # parameters without dimensions
LOG, DIRECT = "A_log", ".D"  # decay and skip of a state space
UNSHIFTED = "linear_attn.norm.weight"  # the one norm of Qwen3-Next that is not 1 + w
# Endings of parameters that have rows for the value heads of linear attention.
OF_VALUES = (
    "in_proj_qkv.weight", "in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "linear_attn.conv1d.weight",
    "linear_attn.A_log", "linear_attn.dt_bias",
)  # fmt: skip
# Endings of parameters with a dimension of 1 that llama.cpp leaves out, and which one.
FLAT = {
    "shared_expert_gate.weight": 0,
    "moe_statics.e_score_correction_bias": 0,
    "conv1d.weight": 1,
    "conv.conv.weight": 1,
}


def expert_of(parameter: str) -> int | None:
    """The number of the expert that a parameter belongs to; None if it is no expert's."""
    found = EXPERT.search(parameter)
    return None if found is None else int(found[2])


def is_unused(source: str) -> bool:
    """Whether an encoder's parameter comes after the last hidden state (pooler, head), where llama.cpp stops."""
    return source.endswith(POOLER) or source.startswith(HEADS)


class Names:
    """Names and layouts of one model's parameters in transformers and in llama.cpp."""

    def __init__(self, config: PretrainedConfig) -> None:
        """FormatError for an architecture that is not in the table (`architecture_of`)."""
        self.row, self.config = architecture_of(config), config
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.row.name)
        self._map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        self.experts = experts_in(config)

    def has(self, parameter: str) -> bool:
        """Whether llama.cpp's architecture has a tensor for this parameter."""
        with suppress(FormatError):
            return bool(self.of(parameter))
        return False

    def of(self, parameter: str) -> str:
        """llama.cpp's name of a parameter, for experts that of the tensor of all experts of the layer; of one that is cut into
        several tensors, the first.

        FormatError if its architecture has no such tensor.
        """
        expert = EXPERT.search(parameter)
        if expert is not None and self.experts:
            return f"blk.{expert[1]}.ffn_{expert[3]}_exps.{expert[4]}"
        share, parts = share_of(self.config, parameter), parts_of(self.config, parameter)
        if share is not None or parts:
            return parts[0].name if share is None else share.name
        ending = next((end for end in RENAMED if parameter.endswith(end)), None)
        known = parameter if ending is None else parameter.removesuffix(ending) + RENAMED[ending]
        root, other = ROOTS.get(self.row.kind, ("", ""))
        names = (known, other + known.removeprefix(root)) if other and known.startswith(root) else (known,)
        tries = (self._map.get_name(name, try_suffixes=(".weight", ".bias")) for name in names)
        found = next((name for name in tries if name is not None), None)
        if found is None:
            remedy = "keep to the architecture's own tensors"
            raise FormatError(
                f"architecture {self.row.name} of llama.cpp has no such tensor", where=parameter, remedy=remedy
            )
        return str(found)

    def tensors_of(self, parameter: str) -> list[str]:
        """The names of all tensors that hold a parameter. FormatError as `of`."""
        return [part.name for part in parts_of(self.config, parameter)] or [self.of(parameter)]

    def places(self, parameter: str, shape: tuple[int, ...]) -> list[Place]:
        """Where a parameter of this shape, as `written`, lies: in one tensor or a part of it, or in several tensors."""
        name, rows = self.of(parameter), prod(shape[:-1])
        expert, share = expert_of(parameter), share_of(self.config, parameter)
        if expert is not None and self.experts:
            return [Place(name, expert * rows, rows, (self.experts, *shape))]
        if share is not None:
            return [share.place(shape, rows)]
        cuts = parts_of(self.config, parameter) or (Part(name, rows),)
        if sum(part.rows for part in cuts) != rows:
            message = f"it has {rows} rows, the config means {sum(part.rows for part in cuts)}"
            raise CheckpointError(message, where=parameter, remedy="config.json and weights must belong together")
        if name == PER_LAYER:  # rows for all tokens; those of images and sounds stay zero
            return [Place(name, 0, rows, (max(rows, self.config.vocab_size), *shape[1:]))]
        return [Place(n, 0, count, shape if len(cuts) == 1 else (count, *shape[1:])) for n, count in cuts]

    def is_float32(self, parameter: str, axes: int) -> bool:
        """Whether llama.cpp stores a parameter in float32: vectors, routers, position and token-type embeddings. axes:
        dimensions."""
        return axes < 2 or self.of(parameter) in TABLES or self.of(parameter).endswith(FLOAT32)

    def rows(self, parameter: str, N: int) -> Tensor | None:
        """The permutation (or selection) of a parameter's N rows on writing: index of the source row of each written row.

        None: rows keep their order.
        """
        if parameter.endswith(POSITIONS) and first_position(self.config):
            return torch.arange(first_position(self.config), N)
        leaf = parameter.rpartition(".")[0].rpartition(".")[2]
        if self.row.fused and leaf == "query_key_value":
            heads = self.config.num_attention_heads
            return _by_head(parameter, N, heads, 3).transpose(0, 1).reshape(N)
        if self.row.kind == "falcon" and leaf == "query_key_value":
            return self._falcon_rows(N)
        if leaf == "in_proj_qkvz":
            return self._gated_rows(N)
        if self.row.tiled and parameter.endswith(OF_VALUES):
            return self._value_rows(parameter, N)
        if not self.row.pairs or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if leaf == "q_proj" else self.config.num_key_value_heads
        return _by_head(parameter, N, heads, 2).transpose(1, 2).reshape(N)

    def _falcon_rows(self, N: int) -> Tensor:
        """All of Q, then K, then V, from groups of query heads, each with its key and value."""
        groups, heads = falcon_kv_heads(self.config), self.config.num_attention_heads
        each = heads // groups
        order = torch.arange(N).view(groups, each + 2, -1)
        return torch.cat([order[:, :each].flatten(), order[:, each].flatten(), order[:, each + 1].flatten()])

    def _gated_rows(self, N: int) -> Tensor:
        """All of Q, K, V and Z, from groups of a query and a key head with their heads of V and Z (Qwen3-Next)."""
        groups, each = self.config.linear_num_key_heads, self.config.linear_key_head_dim
        values = (N // groups - 2 * each) // 2
        order = torch.arange(N).view(groups, -1).split([each, each, values, values], 1)
        return torch.cat([part.flatten() for part in order])

    def _value_rows(self, parameter: str, N: int) -> Tensor:
        """Rows of value heads by `heads`, behind those of queries and keys where there are such (Qwen 3.5)."""
        groups, each = self._value_heads
        before = 2 * self.config.linear_num_key_heads * self.config.linear_key_head_dim
        before = before if parameter.endswith(("in_proj_qkv.weight", "conv1d.weight")) else 0
        if (N - before) % (groups * each):
            message = f"its {N - before} rows of values are not {groups} groups of {each} heads"
            raise CheckpointError(message, where=parameter, remedy="the file is damaged: get a good copy")
        order = head_by_head((groups, each), N - before)
        order = torch.arange(N - before) if order is None else order
        return torch.cat([torch.arange(before), before + order])

    @property
    def _value_heads(self) -> tuple[int, int]:
        """Key heads of linear attention, and value heads of each. CheckpointError where they do not divide so."""
        keys, values = self.config.linear_num_key_heads, self.config.linear_num_value_heads
        if keys <= 0 or values % keys:
            message = f"{values} heads of values for {keys} of keys"
            raise CheckpointError(message, where="linear_num_value_heads", remedy="a multiple of linear_num_key_heads")
        return keys, values // keys

    def heads(self, parameter: str) -> tuple[int, int]:
        """(groups, heads in each) of a matrix's inputs, which are written by `head_by_head`; (1, 1): as they are."""
        return self._value_heads if self.row.tiled and parameter.endswith("linear_attn.out_proj.weight") else (1, 1)

    def columns(self, parameter: str, K: int) -> Tensor | None:
        """The permutation of a matrix's K columns on writing; None: they keep their order."""
        return head_by_head(self.heads(parameter), K)

    def height(self, parameter: str, N: int) -> int:
        """The number of rows that are written of a parameter with N rows."""
        return N - first_position(self.config) if parameter.endswith(POSITIONS) else N

    def written(self, parameter: str, tensor: Tensor) -> Tensor:
        """A float tensor in llama.cpp's layout: transposed, rows permuted, norms shifted by 1, A from its logarithm, vectors in
        float32."""
        tensor = tensor.T if self._is_transposed(parameter) else tensor
        flat = next((dim for end, dim in FLAT.items() if parameter.endswith(end)), None)
        tensor = tensor if flat is None else tensor.squeeze(flat)
        with tensor.device:  # on meta too: a damaged file's sizes may be any
            if tensor.ndim:
                tensor = permuted(tensor, self.rows(parameter, len(tensor)), 0)
                tensor = permuted(tensor, self.columns(parameter, tensor.shape[-1]))
        tensor = tensor.float() if self.is_float32(parameter, tensor.ndim) else tensor
        tensor = -tensor.exp() if parameter.endswith(LOG) else tensor
        tensor = tensor.reshape(self._grouped(parameter) or tensor.shape)
        return tensor + 1 if self._is_shifted(parameter) else tensor

    def read(self, parameter: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor from a GGUF file in transformers' layout and of this shape; undoes `written`."""
        tensor = tensor - 1 if self._is_shifted(parameter) else tensor
        tensor = (-tensor).log() if parameter.endswith(LOG) else tensor
        tensor = unpermuted(tensor, self.rows(parameter, len(tensor)), 0)
        tensor = unpermuted(tensor, self.columns(parameter, tensor.shape[-1]))
        return tensor.T if self._is_transposed(parameter) else tensor.reshape(shape)

    def own_shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a parameter as `written`, given its shape in transformers."""
        return tuple(self.written(parameter, torch.empty(shape, device="meta")).shape)

    def _grouped(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a vector of Mamba 2's that llama.cpp has as a matrix: its norm by groups, A and D as columns; and of a
        number that it has as a vector."""
        if parameter.endswith(NUMBERS):
            return (1,)
        if not self.row.groups:
            return None
        if parameter.endswith((LOG, DIRECT)):
            return -1, 1
        inside = parameter.endswith((".mixer.norm.weight", ".mamba.norm.weight"))
        return (getattr(self.config, self.row.groups), -1) if inside else None

    def _is_transposed(self, parameter: str) -> bool:
        return self.row.kind == "gpt2" and parameter.endswith(TRANSPOSED)

    def _is_shifted(self, parameter: str) -> bool:
        return self.row.shifted and parameter.endswith("norm.weight") and not parameter.endswith(UNSHIFTED)


def _by_head(parameter: str, N: int, heads: int, parts: int) -> Tensor:
    """The numbers of N rows, [heads, parts, N / heads / parts]. CheckpointError where they do not divide so."""
    if heads <= 0 or N % (heads * parts):
        message = f"its {N} rows are not {heads} heads of {parts} equal parts"
        raise CheckpointError(message, where=parameter, remedy="the file is damaged: get a good copy")
    return torch.arange(N).view(heads, parts, N // heads // parts)
