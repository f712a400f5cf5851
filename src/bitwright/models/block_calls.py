"""What a model calls its blocks with, recorded from its own forward, and whatever of that depends on the tokens carried along.

Ports stand in for the blocks while the model's forward runs. Most blocks are called with a hidden state [B, T, H] and with
masks and rotary embeddings that are the same for any tokens. Some are called with more that depends on the tokens: inputs of
each layer (Gemma 3n), the embeddings once more (Zamba), keys and values of an earlier block (Gemma 4). That is packed behind
the hidden state, [B, T, W] instead of [B, T, H], so that whoever carries states from block to block, cuts them into batches
and keeps them on the disk need not know of it.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bitwright.errors import CheckpointError

HIDDEN = "hidden"
PROBE = (
    3,
    11,
)  # windows and tokens of what is run to find out which arguments depend on the tokens: sizes seen nowhere else
TOO_ODD = (
    RuntimeError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
)  # what a forward says of a result of another form
FORMS: tuple[Callable[[Tensor], Any], ...] = (  # in which blocks give their hidden state to the model
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)


@dataclass(frozen=True)
class Call:
    """One call of a block: all arguments, the hidden state among them, as a flat list; which of them that is."""

    values: list[Any]
    spec: TreeSpec
    hidden: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """CheckpointError for one that is handed no tensor. Keywords come in the order of the call."""
        values, spec = tree_flatten((args, kwargs))
        at = next(
            (i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()), None
        )
        if at is None:
            raise CheckpointError("its blocks are called without a hidden state", remedy=ALONE)
        return cls(values, spec, at)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As a block takes them."""
        args, kwargs = tree_unflatten(self.values, self.spec)
        return args, kwargs


ALONE = "blocks are run one by one here, which this model does not allow; `--calib none` with method rtn, search or hqq"


class WrongForm(RuntimeError):  # noqa: N818
    """A port was not given what the one before it gave: the model takes results of another form."""


class _Port(nn.Module):
    """Stands in for a block: records what it is called with; hands on its hidden state, or one of our own."""

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
    """Ports in the place of all blocks for a while."""
    setattr(parent, attribute, nn.ModuleList(_Port(block, record, FORMS[form], inject) for block in blocks))
    try:
        yield
    finally:
        setattr(parent, attribute, blocks)


@dataclass(frozen=True)
class Part:
    """One tensor of a packed state [B, T, W]: its axes for windows and tokens, and the extents of the others."""

    windows: int
    tokens: int
    others: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, windows: int, tokens: int) -> "Part":
        """CheckpointError for a tensor without those extents."""
        shape = list(x.shape)
        if windows not in shape or tokens not in shape or not x.is_floating_point():
            raise CheckpointError(f"its blocks are called with a tensor {shape} made of the tokens", remedy=ALONE)
        b, t = shape.index(windows), shape.index(tokens)
        return cls(b, t, tuple(n for axis, n in enumerate(shape) if axis not in (b, t)))

    @property
    def width(self) -> int:
        """How much of W it takes."""
        return int(torch.Size(self.others).numel())

    @property
    def plain(self) -> bool:
        """Whether the tensor is [B, T, W] itself."""
        return (self.windows, self.tokens, len(self.others)) == (0, 1, 1)

    def packed(self, x: Tensor) -> Tensor:
        """x -> [B, T, width]."""
        return x if self.plain else x.movedim((self.windows, self.tokens), (0, 1)).flatten(2)

    def unpacked(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the tensor as it was."""
        if self.plain:
            return x
        return x.unflatten(2, self.others).movedim((0, 1), (self.windows, self.tokens))


@dataclass
class Calls:
    """How the blocks of one model are called: found out once, on a probe; then filled in for each number of windows.

    form     index into FORMS
    hidden   the hidden state
    given    for each block: argument -> which of `parts` it is
    parts    tensors that depend on the tokens, beside the hidden state
    shared   for each block: the argument that is a mapping which blocks hand on to one another
    handed   for each block, as far as is known: what such a mapping holds when it is called
    """

    depth: int
    form: int = 0
    hidden: Part = Part(0, 1, (1,))
    given: list[dict[int, int]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    shared: list[int | None] = field(default_factory=list)
    handed: list[dict[Any, tuple[Part, ...]] | None] = field(default_factory=list)

    def learn(self, one: list[Call], other: list[Call]) -> None:
        """From two forwards of other tokens: which arguments differ."""
        windows, tokens = PROBE
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
        """Whether blocks are given nothing of the tokens but a hidden state [B, T, H]."""
        return self.hidden.plain and not self.parts and not any(at is not None for at in self.shared)

    def _layout(self, index: int) -> dict[Any, Part]:
        """What a packed state consists of, in order, that block `index` is given; behind the last: the hidden state alone."""
        handed = self.handed[index]
        if handed is None:
            raise CheckpointError(f"block {index} is run before the blocks that hand it keys and values")
        needed = sorted({part for own in self.given[index:] for part in own.values()})
        shared = {(key, j): part for key, parts in handed.items() for j, part in enumerate(parts)}
        return {HIDDEN: self.hidden, **{i: self.parts[i] for i in needed}, **shared}

    def first(self, calls: list[Call]) -> Tensor:
        """What is carried to the first block, packed."""
        hidden: Tensor = calls[0].values[calls[0].hidden]
        if self.plain:
            return hidden
        found: dict[Any, Tensor] = {HIDDEN: hidden}
        for call, own in zip(calls, self.given, strict=True):
            found |= {part: call.values[at] for at, part in own.items()}
        return _packed(self._layout(0), found)

    def own(self, packed: Tensor) -> Tensor:
        """The hidden state alone, [B, T, H or more], of a packed one."""
        return packed if self.plain else packed[..., : self.hidden.width]

    def last(self, packed: Tensor) -> Tensor:
        """The hidden state as the model has it behind its last block."""
        return self.hidden.unpacked(self.own(packed))

    def fill(self, index: int, call: Call, packed: Tensor) -> Call:
        """Block `index`'s call with what is carried to it."""
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
        """What is carried on from block `index`, which was called so and gave `out`."""
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
    """Of one tensor [B, heads, T, D]."""
    return Part(0, 2, (x.shape[1], x.shape[3]))
