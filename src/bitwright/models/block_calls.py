"""Record the arguments with which a model calls its decoder blocks, so that the blocks can be run one at a time.

While the model's own forward runs, ports take the place of the blocks and record their arguments. Most blocks get a hidden
state [B, T, H], and masks and rotary embeddings that do not depend on the tokens. Some get further tensors that do: per-layer
inputs (Gemma 3n), the embeddings again (Zamba), keys and values of an earlier block (Gemma 4). These are concatenated to the
hidden state, [B, T, W] instead of [B, T, H], so that the code that passes states from block to block, splits them into
batches and keeps them on disk handles one tensor.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bitwright.errors import CheckpointError

HIDDEN = "hidden"
PROBE = (
    3,
    11,
)  # windows and tokens of the probe batch that shows which arguments depend on the tokens; sizes that nothing else has
TOO_ODD = (
    RuntimeError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
)  # errors of a model's forward if blocks return a form that it does not expect
FORMS: tuple[Callable[[Tensor], Any], ...] = (  # forms in which blocks return the hidden state
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)


@dataclass(frozen=True)
class Call:
    """One call of a block. values, spec: all arguments, flattened (pytree); hidden: index of the hidden state in values."""

    values: list[Any]
    spec: TreeSpec
    hidden: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """The hidden state is the first floating-point tensor. CheckpointError if there is none."""
        values, spec = tree_flatten((args, kwargs))
        at = next(
            (i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()), None
        )
        if at is None:
            raise CheckpointError("its blocks are called without a hidden state", remedy=ALONE)
        return cls(values, spec, at)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the block."""
        args, kwargs = tree_unflatten(self.values, self.spec)
        return args, kwargs


ALONE = "blocks are run one by one here, which this model does not allow; `--calib none` with method rtn, search or hqq"


class WrongForm(RuntimeError):  # noqa: N818
    """A port did not get what the one before it returned: the model expects another form of results."""


class _Port(nn.Module):
    """Stands in for a block: records its arguments, and returns its hidden state unchanged, or `inject` instead."""

    def __init__(
        self, block: nn.Module, record: list[Call], form: Callable[[Tensor], Any], inject: Tensor | None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.record, self.form, self.inject = record, form, inject

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = Call.of(args, kwargs)
        hidden = call.values[call.hidden]
        if self.record and (
            call.hidden != self.record[0].hidden or hidden.ndim != self.record[0].values[call.hidden].ndim
        ):
            raise WrongForm("the second block is not given what the first one gave")
        self.record.append(call)
        return self.form(hidden if self.inject is None else self.inject)


@contextmanager
def ports(
    parent: nn.Module,
    attribute: str,
    blocks: nn.ModuleList,
    record: list[Call],
    form: int,
    inject: Tensor | None = None,
) -> Iterator[None]:
    """Within this context, all blocks are replaced by ports. form: index into FORMS; inject: what the ports return."""
    setattr(parent, attribute, nn.ModuleList(_Port(block, record, FORMS[form], inject) for block in blocks))
    try:
        yield
    finally:
        setattr(parent, attribute, blocks)


@dataclass(frozen=True)
class Part:
    """The layout of one tensor in a packed state [B, T, W].

    windows, tokens  its dimensions of windows (B) and tokens (T)
    others           sizes of its other dimensions
    """

    windows: int
    tokens: int
    others: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, windows: int, tokens: int) -> "Part":
        """The layout of x, found by the numbers of windows and tokens. CheckpointError if x has no such dimensions."""
        shape = list(x.shape)
        if windows not in shape or tokens not in shape or not x.is_floating_point():
            raise CheckpointError(f"its blocks are called with a tensor {shape} made of the tokens", remedy=ALONE)
        b, t = shape.index(windows), shape.index(tokens)
        return cls(b, t, tuple(n for axis, n in enumerate(shape) if axis not in (b, t)))

    @property
    def width(self) -> int:
        """The part of W that the tensor takes."""
        return int(torch.Size(self.others).numel())

    @property
    def plain(self) -> bool:
        """Whether the tensor is [B, T, W] already."""
        return (self.windows, self.tokens, len(self.others)) == (0, 1, 1)

    def packed(self, x: Tensor) -> Tensor:
        """x -> [B, T, width]."""
        return x if self.plain else x.movedim((self.windows, self.tokens), (0, 1)).flatten(2)

    def unpacked(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the tensor in its own layout."""
        if self.plain:
            return x
        return x.unflatten(2, self.others).movedim((0, 1), (self.windows, self.tokens))


@dataclass
class Calls:
    """How the blocks of one model are called; learned once from a probe batch.

    depth    number of blocks
    form     index into FORMS
    hidden   layout of the hidden state
    given    for each block: index of an argument -> index into `parts`
    parts    layouts of the tensors that depend on the tokens, besides the hidden state
    shared   for each block: index of the argument that is a mapping through which blocks pass keys and values on, or None
    handed   for each block: the layouts in that mapping when the block is called; None: not known yet
    """

    depth: int
    form: int = 0
    hidden: Part = Part(0, 1, (1,))
    given: list[dict[int, int]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    shared: list[int | None] = field(default_factory=list)
    handed: list[dict[Any, tuple[Part, ...]] | None] = field(default_factory=list)

    def learn(self, one: list[Call], other: list[Call]) -> None:
        """Learn from two forwards with different tokens, in which blocks return their input: arguments that differ depend on
        the tokens. CheckpointError for a model that does more to the hidden state than its blocks do."""
        windows, tokens = PROBE
        if any(not torch.equal(a.values[a.hidden], b.values[b.hidden]) for a, b in pairwise(one)):
            raise CheckpointError("the hidden state changes between its blocks, outside of them", remedy=ALONE)
        self.hidden = Part.of(one[0].values[one[0].hidden], windows, tokens)
        self.given, self.parts, self.shared = [], [], []
        known: dict[tuple[int, ...], int] = {}
        for a, b in zip(one, other, strict=True):
            own: dict[int, int] = {}
            mapping = None
            for at, (x, y) in enumerate(zip(a.values, b.values, strict=True)):
                if at == a.hidden:
                    continue
                if isinstance(x, MutableMapping):
                    mapping = at
                elif isinstance(x, Tensor) and not torch.equal(x, y):
                    place = (x.data_ptr(), *x.shape, *x.stride())
                    if place not in known:
                        known[place] = len(self.parts)
                        self.parts.append(Part.of(x, windows, tokens))
                    own[at] = known[place]
            self.given.append(own)
            self.shared.append(mapping)
        self.handed = [{} if i == 0 or self.shared[i] is None else None for i in range(self.depth)] + [{}]

    @property
    def plain(self) -> bool:
        """Whether nothing but a hidden state [B, T, H] depends on the tokens."""
        return self.hidden.plain and not self.parts and not any(at is not None for at in self.shared)

    def _layout(self, index: int) -> dict[Any, Part]:
        """The layout of the packed state that block `index` gets, in order; after the last block, only the hidden state."""
        handed = self.handed[index]
        if handed is None:
            raise CheckpointError(f"block {index} is run before the blocks that hand it keys and values")
        needed = sorted({part for own in self.given[index:] for part in own.values()})
        shared = {(key, j): part for key, parts in handed.items() for j, part in enumerate(parts)}
        return {HIDDEN: self.hidden, **{i: self.parts[i] for i in needed}, **shared}

    def first(self, calls: list[Call]) -> Tensor:
        """The packed state for the first block."""
        hidden: Tensor = calls[0].values[calls[0].hidden]
        if self.plain:
            return hidden
        found: dict[Any, Tensor] = {HIDDEN: hidden}
        for call, own in zip(calls, self.given, strict=True):
            found |= {part: call.values[at] for at, part in own.items()}
        return _packed(self._layout(0), found)

    def own(self, packed: Tensor) -> Tensor:
        """The hidden state in a packed state, [B, T, its width]."""
        return packed if self.plain else packed[..., : self.hidden.width]

    def last(self, packed: Tensor) -> Tensor:
        """The hidden state after the last block, in the model's own layout."""
        return self.hidden.unpacked(self.own(packed))

    def fill(self, index: int, call: Call, packed: Tensor) -> Call:
        """Block `index`'s call with the tensors of a packed state in it."""
        values = list(call.values)
        if self.plain:
            values[call.hidden] = packed
            return Call(values, call.spec, call.hidden)
        found = _unpacked(self._layout(index), packed)
        values[call.hidden] = found[HIDDEN]
        for at, part in self.given[index].items():
            values[at] = found[part]
        mapping = self.shared[index]
        if mapping is not None:
            handed = self.handed[index] or {}
            values[mapping] = type(values[mapping])()
            values[mapping].update(
                {key: tuple(found[key, j] for j in range(len(parts))) for key, parts in handed.items()}
            )
        return Call(values, call.spec, call.hidden)

    def then(self, index: int, packed: Tensor, call: Call, out: Any) -> Tensor:
        """The packed state for the next block. packed, call, out: state, call and result of block `index`."""
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        if self.plain:
            return hidden
        found = _unpacked(self._layout(index), packed) | {HIDDEN: hidden}
        mapping = self.shared[index]
        if mapping is not None and index + 1 < self.depth:
            shared = call.values[mapping]
            found |= {(key, j): x for key, tensors in shared.items() for j, x in enumerate(tensors)}
            self.handed[index + 1] = {
                key: tuple(_keys_or_values(x) for x in tensors) for key, tensors in shared.items()
            }
        return _packed(self._layout(index + 1), found)


def _packed(layout: Mapping[Any, Part], tensors: Mapping[Any, Tensor]) -> Tensor:
    dtype = tensors[HIDDEN].dtype
    return torch.cat([part.packed(tensors[key]).to(dtype) for key, part in layout.items()], -1)


def _unpacked(layout: Mapping[Any, Part], packed: Tensor) -> dict[Any, Tensor]:
    pieces = packed.split([part.width for part in layout.values()], -1)
    return {key: part.unpacked(x) for (key, part), x in zip(layout.items(), pieces, strict=True)}


def _keys_or_values(x: Tensor) -> Part:
    """The layout of keys or values [B, heads, T, D]."""
    return Part(0, 2, (x.shape[1], x.shape[3]))
