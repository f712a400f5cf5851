"""Parameters that are not one tensor of a GGUF file each: cut into several tensors, or one of several in a tensor.

A parameter's rows are those that `Names.written` gives, all dimensions but the last counted as rows. Source: llama.cpp's
converter (conversion/*.py).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from transformers import PretrainedConfig

from bitwright.gguf.reader import ENTRIES

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)$")


class Place(NamedTuple):
    """Where some rows of a parameter lie: `rows` rows from row `first` on of tensor `name`, whose shape is `shape`."""

    name: str
    first: int
    rows: int
    shape: tuple[int, ...]


class Share(NamedTuple):
    """A parameter that is number `number` of `of` in a tensor, stacked along a dimension of their own, or `joined` by rows."""

    name: str
    number: int
    of: int
    joined: bool = False

    def place(self, shape: tuple[int, ...], rows: int) -> Place:
        """Its place, for a parameter of this shape."""
        whole = (self.of * shape[0], *shape[1:]) if self.joined else (self.of, *shape)
        return Place(self.name, self.number * rows, rows, whole)


class Part(NamedTuple):
    """A tensor that holds some rows of a parameter."""

    name: str
    rows: int


def _granite(config: PretrainedConfig, block: str, leaf: str) -> tuple[Part, ...]:
    """Gate and up of the shared expert are one matrix; without other experts it is an ordinary MLP."""
    end = "_shexp" if config.num_local_experts else ""
    if leaf == "shared_mlp.input_linear.weight":
        return tuple(
            Part(f"blk.{block}.ffn_{which}{end}.weight", config.shared_intermediate_size) for which in ("gate", "up")
        )
    if leaf == "shared_mlp.output_linear.weight":
        return (Part(f"blk.{block}.ffn_down{end}.weight", config.hidden_size),)
    return ()


def _gated_states(config: PretrainedConfig, block: str, leaf: str) -> tuple[Part, ...]:
    """Queries, keys and values of linear attention, and its gate (z), are one matrix."""
    if leaf != "linear_attn.in_proj_qkvz.weight":
        return ()
    keys, values = (
        config.linear_num_key_heads * config.linear_key_head_dim,
        config.linear_num_value_heads * config.linear_value_head_dim,
    )
    return Part(f"blk.{block}.attn_qkv.weight", 2 * keys + values), Part(f"blk.{block}.attn_gate.weight", values)


def _routed(config: PretrainedConfig, block: str, leaf: str) -> tuple[Part, ...]:
    """What a router multiplies its inputs by, and the outputs of its experts (Gemma 4)."""
    scales = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
    return (Part(f"blk.{block}.{scales[leaf]}", 1),) if leaf in scales else ()


def _activation(config: PretrainedConfig, block: str, leaf: str) -> tuple[Part, ...]:
    """The parameters of xIELU, which are entries of a key's array (`GgufFile.entries`)."""
    entry = f"xielu.{leaf.rpartition('.')[2]}"
    return (Part(f"blk.{block}.{entry}", 1),) if leaf.startswith("mlp.act_fn.") and entry in ENTRIES else ()


def _nomic(config: PretrainedConfig, block: str, leaf: str) -> tuple[Part, ...]:
    """The norms of an encoder, behind attention and behind the MLP."""
    norm, _, end = leaf.rpartition(".")
    names = {"post_attention_layernorm": "attn_output_norm", "post_mlp_layernorm": "layer_output_norm"}
    return (Part(f"blk.{block}.{names[norm]}.{end}", 1),) if norm in names else ()


PARTS: dict[str, Callable[[PretrainedConfig, str, str], tuple[Part, ...]]] = {
    "granitemoeshared": _granite,
    "granitemoehybrid": _granite,
    "qwen3_next": _gated_states,
    "gemma4_text": _routed,
    "apertus": _activation,
    "nomic_bert": _nomic,
}
BOTH = re.compile(r"^(blk\.\d+\.ffn_)(gate|up)(_exps\.weight)$")


def in_one(place: Place) -> Place:
    """Where the rows of an expert's gate or up lie in a file that has those of all experts in one tensor."""
    found = BOTH.match(place.name)
    if found is None:
        return place
    first = 2 * place.first + (place.rows if found[2] == "up" else 0)
    experts, rows, width = place.shape
    return Place(f"{found[1]}gate_up{found[3]}", first, place.rows, (experts, 2 * rows, width))


QKV = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.([qkv])_proj\.weight$")
ALTUP = re.compile(r"altup_(unembed_)?projections\.(\d+)\.weight$")


def parts_of(config: PretrainedConfig, parameter: str) -> tuple[Part, ...]:
    """The tensors into which a parameter is cut, in the order of its rows; (): it is not cut."""
    found, cut = BLOCK.search(parameter), PARTS.get(config.model_type)
    return () if found is None or cut is None else cut(config, found[1], found[2])


def share_of(config: PretrainedConfig, parameter: str) -> Share | None:
    """The tensor that a parameter shares with others; None if it shares none."""
    altup, qkv = ALTUP.search(parameter), QKV.search(parameter)
    if qkv is not None and config.model_type == "nomic_bert":
        return Share(f"blk.{qkv[1]}.attn_qkv.weight", "qkv".index(qkv[2]), 3, joined=True)
    if altup is None:
        return None
    name = f"altup_{'unembd_' if altup[1] else ''}proj.weight"  # all hidden states of Gemma 3n but the first have one
    return Share(name, int(altup[2]), config.altup_num_inputs - 1)
