"""Spare a block's forward what an earlier pass has computed, while its matrices are quantized one input after the other.

Each input is observed by a pass of its own: o_proj's computes queries, keys, values and attention, gate's and up's computes
them again, then down's, then the pass that moves the hidden states on. But once o_proj is quantized the attention module's
result is settled: it is o_proj's output for the inputs that were just observed. It is computed from those, and later passes
take it in place of the module's forward. The numbers are the same; a block of Llama's takes one forward instead of three.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Enclosing:
    """A module whose result is the output of a linear module inside it, such as an attention module with its o_proj.

    name, linear  full names
    nones         how many None follow in the tuple that it returns; None: it returns the tensor alone
    """

    name: str
    linear: str
    nones: int | None

    @classmethod
    def of(cls, linear: str, returned: dict[str, list[Any]], block: str) -> "Enclosing | None":
        """The largest one inside `block`; None if there is none. returned: what each call of a module has returned, by name."""
        inside = linear.removeprefix(block).split(".")
        for depth in range(1, len(inside)):
            name = block + ".".join(inside[:depth])
            calls = returned.get(name, [])
            if len(calls) != 1:  # a container, or a module that the block calls several times
                continue
            first, *others = calls[0] if isinstance(calls[0], tuple) else (calls[0],)
            if first is returned[linear][0] and all(other is None for other in others):
                return cls(name, linear, len(others) if isinstance(calls[0], tuple) else None)
        return None

    def result(self, out: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """What the module returns if its linear module's output is `out`; a copy, which the block may write to."""
        return out.clone() if self.nones is None else (out.clone(), *[None] * self.nones)


@dataclass
class KnownOutputs:
    """What enclosing modules return for some of a block's inputs, in at most `limit` bytes.

    A block's input is known by the tensor's identity, not by its values.
    """

    limit: int
    used: int = 0
    inputs: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    outputs: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def keep_input(self, hidden: Tensor, x: Tensor) -> None:
        """Keep x [..., K], the input of a linear module for the block's input `hidden`, if there is room."""
        if self.used + x.nbytes <= self.limit:
            self.inputs[hidden] = x
            self.used += x.nbytes

    def settle(self, module: Enclosing, linear: Callable[[Tensor], Tensor]) -> None:
        """Compute a module's results from the inputs that were kept; linear: its linear module, as it is quantized."""
        for hidden, x in list(self.inputs.items()):
            out = linear(x)
            self.used += out.nbytes - x.nbytes
            self.outputs.setdefault(hidden, {})[module.linear] = module, out
        self.inputs.clear()

    def of(self, hidden: Tensor) -> dict[str, Tensor]:
        """The outputs of linear modules that are known for a block's input, by name."""
        return {name: out for name, (_, out) in self.outputs.get(hidden, {}).items()}

    def clear(self) -> None:
        """Forget all: weights have changed."""
        self.inputs.clear()
        self.outputs.clear()
        self.used = 0

    @contextmanager
    def standing_in(self, model: nn.Module, hidden: Tensor) -> Iterator[None]:
        """Within this context, modules of the model that are known for `hidden` return what they are known to."""
        known = [
            (model.get_submodule(module.name), module, out) for module, out in self.outputs.get(hidden, {}).values()
        ]
        for stood_for, module, out in known:
            stood_for.forward = lambda *_, m=module, o=out, **__: m.result(o)
        try:
            yield
        finally:
            for stood_for, _, _ in known:
                del stood_for.forward
