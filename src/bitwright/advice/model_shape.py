"""What a model needs of a machine, from its config and headers alone: weights by kind, KV cache, activations."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.files.hub import local
from bitwright.files.model_path import is_gguf
from bitwright.gguf.layer_values import of_layer
from bitwright.gguf.reader import GgufFile
from bitwright.models.config import quantization_of, read_config
from bitwright.models.families import positions_of
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.scheme import Scheme

TOKENS_AT_ONCE = 512  # of a prompt that engines let through together
CACHED_BYTES = 2  # of a number in the KV cache: 16 bits
KEPT_BITS = 16  # of what formats other than GGUF keep in float
GGUF_ENDS = "q6_k"  # what llama.cpp's mixes give the output head


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    matrices     (N, K) -> how many of the blocks' matrices have this shape; active: how many of them a token meets
    embedding    parameters of the embedding; head: of the output head, whether or not it is the same matrix
    other        all other parameters: norms, biases, towers
    cached       numbers that one more token adds to the KV cache, and the most tokens that they are kept for; a group of layers
                 each
    stored       how the weights are stored: "bfloat16", "gptq", ...
    """

    name: str
    matrices: Mapping[tuple[int, int], int]
    active: Mapping[tuple[int, int], int]
    embedding: int
    head: int
    tied: bool
    other: int
    hidden: int
    widest: int
    vocabulary: int
    cached: tuple[tuple[int, int | None], ...]
    positions: int | None
    stored: str
    quantized: bool
    predicts: bool

    @property
    def in_blocks(self) -> int:
        """Parameters of the blocks' matrices."""
        return sum(count * N * K for (N, K), count in self.matrices.items())

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        return self.in_blocks + self.embedding + (0 if self.tied else self.head) + self.other

    def weight_bytes(self, scheme: str) -> int:
        """Bytes of all weights, where the blocks' matrices are in this scheme ("float32", "bfloat16" or a number format).

        The k-quants and llama.cpp's other types stand for GGUF files, whose embedding and head are quantized too.
        """
        bits, ends = _bits(scheme)
        blocks = sum(count * N * K * bits(K) for (N, K), count in self.matrices.items())
        outside = self.embedding + (0 if self.tied else self.head)
        return round((blocks + (outside + self.other) * ends) / 8)

    def read_bytes(self, scheme: str) -> int:
        """Bytes of the weights that one token reads: those of the experts that it is sent to, and the head."""
        bits, ends = _bits(scheme)
        return round(sum(count * N * K * bits(K) for (N, K), count in self.active.items()) / 8 + self.head * ends / 8)

    def cache_bytes(self, context: int, *, number: int = CACHED_BYTES) -> int:
        """Bytes of the KV cache of one sequence of `context` tokens."""
        return sum(numbers * min(context, most or context) for numbers, most in self.cached) * number

    @property
    def activation_bytes(self) -> int:
        """Bytes of the largest activations of a prompt in pieces of 512 tokens, and of one token's logits; float32."""
        return 4 * (TOKENS_AT_ONCE * (6 * self.hidden + 3 * self.widest) + self.vocabulary)


def _bits(scheme: str) -> "tuple[Any, float]":
    """Bits a weight of a matrix with rows of K, and of what is outside the blocks."""
    if scheme in FLOATS:
        return (lambda _: FLOATS[scheme]), FLOATS[scheme]
    ends = head_type(scheme)
    return Scheme.parse(scheme).bits_per_weight, Scheme.parse(ends).bits_per_weight(256) if ends else KEPT_BITS


def head_type(scheme: str) -> str:
    """What a GGUF file of a block type has for embedding and head: `GGUF_ENDS`, or that type where it is wider; "" for other
    formats' schemes, which leave both in float."""
    if not scheme.startswith(("q", "iq")):
        return ""
    return max(GGUF_ENDS, scheme, key=lambda name: Scheme.parse(name).bits_per_weight(256))


FLOATS = {"float32": 32, "bfloat16": 16, "float16": 16}


def shape_of(model: Path) -> ModelShape:
    """The shape of a checkpoint directory, a GGUF file, or a config.json by itself (the file, or a directory with no more).

    CheckpointError for a config that is missing, damaged, or of an unknown architecture.
    """
    folder = model.parent if model.name == "config.json" and model.is_file() else local(model)
    config = read_config(folder)
    stored, quantized = _stored(folder, config)  # first: a skeleton sets the config's dtype to its own
    skeleton = Skeleton(config, torch.float32)
    text = config.get_text_config()
    matrices, active = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for index in range(len(skeleton)):
        for name, module in skeleton.linears(index).items():
            N, K = matrix_of(module, skeleton.model.get_parameter(f"{name}.weight")).shape
            matrices[N, K] += 1
            active[N, K] += 0 if ".experts." in name else 1
    routed = _experts(skeleton, text)
    active.update(routed)
    ends = skeleton.embedding_and_head()
    embedding = _size(ends[skeleton.embedding_name])
    tied = skeleton.predicts and skeleton.head_name == skeleton.embedding_name
    head = 0 if not skeleton.predicts else embedding if tied else _size(ends[skeleton.head_name])
    whole = sum(p.numel() for p in skeleton.model.parameters())
    blocks = sum(count * N * K for (N, K), count in matrices.items())
    other = whole - blocks - embedding - (0 if tied else head)
    cached = _cached(text) if skeleton.predicts else ()  # an encoder keeps nothing from token to token
    return ModelShape(
        folder.name or str(folder), matrices, active, embedding, head, tied, other, text.hidden_size,
        max((max(shape) for shape in matrices), default=0), text.vocab_size, cached, positions_of(text), stored, quantized,
        skeleton.predicts,
    )  # fmt: skip


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _experts(skeleton: Skeleton, text: Any) -> Counter[tuple[int, int]]:
    """The experts' matrices that one token meets: of each layer as many experts as the router chooses."""
    chosen = next((getattr(text, n) for n in ("num_experts_per_tok", "moe_k", "top_k_experts") if hasattr(text, n)), 1)
    found = Counter[tuple[int, int]]()
    for name, layout in skeleton.experts.items():
        for part, module in skeleton.model.get_submodule(f"{name}.0").named_modules():
            if isinstance(module, nn.Linear):
                shape = skeleton.model.get_parameter(f"{name}.0.{part}.weight").shape
                found[shape[0], shape[1]] += min(int(chosen), layout.E)
    return found


def _cached(text: Any) -> tuple[tuple[int, int | None], ...]:
    """Numbers that a token adds to the KV cache in each group of layers, and for how many tokens they are kept."""
    depth = text.num_hidden_layers
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention: one compressed vector for all heads
        return ((depth * (text.kv_lora_rank + text.qk_rope_head_dim), None),)
    heads = getattr(text, "num_attention_heads", 0) or 0
    if not heads:  # a state space: nothing grows with the context
        return ()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * depth
    shared = getattr(text, "num_kv_shared_layers", None) or 0  # the last layers, which have the keys of earlier ones
    own = kinds[: depth - shared]
    counted = Counter(kind for kind in own if "attention" in kind and kind != "linear_attention")
    window = getattr(text, "sliding_window", None)
    local = ("sliding_attention", "chunked_attention")
    return tuple(
        (2 * n * _key_width(text, heads, kinds.index(kind)), window if kind in local else None)
        for kind, n in counted.items()
    )


def _key_width(text: Any, heads: int, layer: int) -> int:
    """Channels of all keys of a layer."""
    width = of_layer(text, "head_dim", layer) or text.hidden_size // heads
    return int((of_layer(text, "num_key_value_heads", layer) or heads) * width)


def _stored(folder: Path, config: Any) -> tuple[str, bool]:
    """How the weights are stored, and whether that is quantized."""
    if is_gguf(folder):
        kinds = Counter(t.type.name for t in GgufFile(folder).tensors.values() if len(t.shape) > 1)
        kind = kinds.most_common(1)[0][0] if kinds else "F32"
        return kind.lower(), kind not in ("F32", "F16", "BF16")
    found = quantization_of(folder)
    if found is not None:
        return str(found.get("quant_method", "quantized")), True
    return str(config.dtype or "float32").removeprefix("torch."), False
