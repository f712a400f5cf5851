"""Parameters by transformers' names and by llama.cpp's, and what differs in the tensors themselves.

llama.cpp turns Llama's q and k rows so that a rotary pair lies side by side, stores Gemma's norms as 1 + w, has no transposed
matrices, and leaves out the rows of RoBERTa's table of positions that no text reaches (so it is a BERT like any other there).
Tensor names are the gguf package's. Source: llama.cpp's converter (conversion/*.py).
"""

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf.config_keys import architecture_of, first_position

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D
TABLES = ("position_embd.weight", "token_types.weight")  # matrices that are added to, and never multiplied with
POOLER = ("pooler.dense.weight", "pooler.dense.bias")  # an encoder's, which llama.cpp does without
HEADS = (
    "cls.",
    "lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
)  # what encoders were trained with
POSITIONS = "position_embeddings.weight"


def is_unused(source: str) -> bool:
    """Whether an encoder's tensor belongs to what stands behind its last hidden state."""
    return source.endswith(POOLER) or source.startswith(HEADS)


class Names:
    """Parameter names of transformers and llama.cpp, one to one, for one model."""

    def __init__(self, config: PretrainedConfig) -> None:
        """FormatError as of `architecture_of`."""
        self.row, self.config = architecture_of(config), config
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.row.name)
        self._map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def has(self, parameter: str) -> bool:
        """Whether its architecture has such a tensor."""
        return self._map.get_name(parameter, try_suffixes=(".weight", ".bias")) is not None

    def of(self, parameter: str) -> str:
        """llama.cpp's name. FormatError for a tensor that its architecture does not have."""
        found = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            remedy = "keep to the architecture's own tensors"
            raise FormatError(
                f"architecture {self.row.name} of llama.cpp has no such tensor", where=parameter, remedy=remedy
            )
        return str(found)

    def is_float32(self, parameter: str, axes: int) -> bool:
        """Whether llama.cpp wants it in float32: vectors, and tables that are added to what it computes."""
        return axes < 2 or self.of(parameter) in TABLES

    def rows(self, parameter: str, N: int) -> Tensor | None:
        """Where each of N output rows is taken from when it is written; None: they stay."""
        if parameter.endswith(POSITIONS) and first_position(self.config):
            return torch.arange(first_position(self.config), N)
        leaf = parameter.rpartition(".")[0].rpartition(".")[2]
        if not self.row.pairs or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if leaf == "q_proj" else self.config.num_key_value_heads
        return torch.arange(N).view(heads, 2, N // heads // 2).transpose(1, 2).reshape(N)

    def height(self, parameter: str, N: int) -> int:
        """How many of N rows are written."""
        order = self.rows(parameter, N)
        return N if order is None else len(order)

    def written(self, parameter: str, tensor: Tensor) -> Tensor:
        """A float tensor as llama.cpp has it: turned, shifted; vectors in float32."""
        tensor = tensor.T if self._is_transposed(parameter) else tensor
        order = self.rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order]
        tensor = tensor.float() if self.is_float32(parameter, tensor.ndim) else tensor
        return tensor + 1 if self._is_shifted(parameter) else tensor

    def read(self, parameter: str, tensor: Tensor) -> Tensor:
        """Undoes `written`."""
        tensor = tensor - 1 if self._is_shifted(parameter) else tensor
        order = self.rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order.argsort()]
        return tensor.T if self._is_transposed(parameter) else tensor

    def shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that transformers gives to a tensor of that shape in the file."""
        return shape[::-1] if self._is_transposed(parameter) else shape

    def _is_transposed(self, parameter: str) -> bool:
        return self.row.kind == "gpt2" and parameter.endswith(TRANSPOSED)

    def _is_shifted(self, parameter: str) -> bool:
        return self.row.shifted and parameter.endswith("norm.weight")
