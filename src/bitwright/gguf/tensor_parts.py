"""Parameters that are not one tensor of a GGUF file each: cut into several tensors, or one of several in a tensor.

A parameter's rows are those that `Names.written` gives, all dimensions but the last counted as rows. Source: llama.cpp's
converter (conversion/*.py).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from transformers import PretrainedConfig

QKV = re.compile(r"^self_attn\.([qkv])_proj\.(weight|bias)$")
BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)$")


class Place(NamedTuple):
    """Where some rows of a parameter lie: `rows` rows from row `first` on of tensor `name`, whose shape is `shape`."""

    name: str
    first: int
    rows: int
    shape: tuple[int, ...]


class Share(NamedTuple):
    """A parameter that is number `number` of `of` in a tensor.

    apart: whether they are stacked along a dimension of their own; otherwise along their rows.
    """

    name: str
    number: int
    of: int
    apart: bool

    def place(self, shape: tuple[int, ...], rows: int) -> Place:
        """Its place, for a parameter of this shape."""
        whole = (self.of, *shape) if self.apart else (self.of * shape[0], *shape[1:])
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


def _fused(config: PretrainedConfig, block: str, leaf: str) -> Share | None:
    """Queries, keys and values are one tensor, one after the other."""
    found = QKV.search(leaf)
    return None if found is None else Share(f"blk.{block}.attn_qkv.{found[2]}", "qkv".index(found[1]), 3, apart=False)


PARTS: dict[str, Callable[[PretrainedConfig, str, str], tuple[Part, ...]]] = {
    "granitemoeshared": _granite,
    "granitemoehybrid": _granite,
    "qwen3_next": _gated_states,
}
SHARES: dict[str, Callable[[PretrainedConfig, str, str], Share | None]] = {"nomic_bert": _fused}
ALTUP = re.compile(r"altup_(unembed_)?projections\.(\d+)\.weight$")


def parts_of(config: PretrainedConfig, parameter: str) -> tuple[Part, ...]:
    """The tensors into which a parameter is cut, in the order of its rows; (): it is not cut."""
    found, cut = BLOCK.search(parameter), PARTS.get(config.model_type)
    return () if found is None or cut is None else cut(config, found[1], found[2])


def share_of(config: PretrainedConfig, parameter: str) -> Share | None:
    """The tensor that a parameter shares with others; None if it shares none."""
    altup = ALTUP.search(parameter)
    if altup is not None:  # Gemma 3n's, all but the first of its hidden states have one
        name = f"altup_{'unembd_' if altup[1] else ''}proj.weight"
        return Share(name, int(altup[2]), config.altup_num_inputs - 1, apart=True)
    found, shared = BLOCK.search(parameter), SHARES.get(config.model_type)
    return None if found is None or shared is None else shared(config, found[1], found[2])
