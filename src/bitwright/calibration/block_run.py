"""`BlockRun`: a block with some weights replaced and inputs quantized, run on hidden states; its modules' inputs recorded."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.known_outputs import Enclosing, KnownOutputs
from bitwright.errors import BitwrightError
from bitwright.models.kv_cache import KvCache
from bitwright.models.skeleton import Skeleton
from bitwright.numerics.input_quantization import InputQuantization


class EarlyStop(Exception):  # noqa: N818
    """Raised by a hook that has what it needs, to skip the rest of the forward."""


@dataclass
class BlockRun:
    """How block `index` is run: on the skeleton's weights, except for those that are replaced.

    weights              parameters to use instead, by name
    input_quantizations  how inputs are quantized before they are multiplied, by module name
    cache                the KV cache that receives the block's keys and values
    known                what some modules return for some inputs: they are not run again
    """

    skeleton: Skeleton
    index: int
    weights: dict[str, Tensor] = field(default_factory=dict)
    input_quantizations: Mapping[str, InputQuantization | None] = field(default_factory=dict)
    cache: KvCache | None = None
    known: KnownOutputs = field(default_factory=lambda: KnownOutputs(0))

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]."""
        skeleton, known = self.skeleton, self.known.standing_in(self.skeleton.model, hidden)
        with skeleton.quantizing_inputs(self.input_quantizations), skeleton.caching(self.cache), known:
            return skeleton.run_with(self.index, hidden, self.weights)

    def settle(self, module: Enclosing) -> None:
        """Note what a module returns for the inputs that `observe` has kept, now that its linear module is quantized."""
        self.known.settle(module, lambda x: self._linear(module.linear, x))

    @torch.no_grad()
    def _linear(self, name: str, x: Tensor) -> Tensor:
        """Output [..., N] of linear module `name` for x [..., K]."""
        own = {n.removeprefix(f"{name}."): w for n, w in self.weights.items() if n.startswith(f"{name}.")}
        with self.skeleton.quantizing_inputs({name: self.input_quantizations.get(name)}):
            out: Tensor = torch.func.functional_call(self.skeleton.model.get_submodule(name), own, (x,))
        return out

    def handed(self, hidden: Tensor, name: str) -> tuple[Tensor, ...]:
        """All that module `name` is called with, for hidden [B, T, H]; the rest is not computed."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            seen.extend([*args, *named.values()])
            raise EarlyStop

        self._stopped_at(name, keep, lambda: self(hidden))
        return tuple(seen)

    @torch.no_grad()
    def expert_inner(self, experts: str, e: int, x: Tensor) -> Tensor:
        """What down_proj of expert e reads [n, I], for its tokens x [n, H]."""
        name, seen = f"{experts}.{e}", list[Tensor]()
        own = {n.removeprefix(f"{name}."): w for n, w in self.weights.items() if n.startswith(f"{name}.")}
        expert = self.skeleton.model.get_submodule(name)

        def keep(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Tensor]) -> None:
            seen.append(args[0])
            raise EarlyStop

        some = {n: done for n, done in self.input_quantizations.items() if n.startswith(f"{name}.")}
        with self.skeleton.quantizing_inputs(some):
            self._stopped_at(f"{name}.down_proj", keep, lambda: torch.func.functional_call(expert, own, (x,)))
        return seen[0]

    def _stopped_at(self, name: str, keep: Callable[..., None], forward: Callable[[], Tensor]) -> None:
        """Run `forward` until module `name` is called; keep: a hook that sees with what, and raises EarlyStop."""
        hook = self.skeleton.model.get_submodule(name).register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
        try:
            with suppress(EarlyStop):
                forward()
        finally:
            hook.remove()

    def record(
        self, hidden: Tensor, inputs: Iterable[str], outputs: Iterable[str], *, whole: bool = False
    ) -> "Recorded":
        """Record inputs and outputs of these modules for hidden [B, T, H]; unless `whole`, stop the forward after the last.

        Modules that the forward does not reach are missing from the result.
        """
        seen, module = Recorded({}, self.known.of(hidden)), self.skeleton.model.get_submodule
        wanted = [(seen.inputs, name) for name in inputs] + [(seen.outputs, name) for name in outputs]

        def keep(into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
            into[name] = tensor
            if not whole and all(name in there for there, name in wanted):
                raise EarlyStop

        def returned(name: str, out: Any) -> None:
            seen.returned.setdefault(name, []).append(out)
            keep(seen.outputs, name, out[0] if isinstance(out, tuple) else out)

        hooks = [
            module(name).register_forward_pre_hook(lambda _, args, n=name: keep(seen.inputs, n, args[0]))
            if into is seen.inputs
            else module(name).register_forward_hook(lambda _, __, out, n=name: returned(n, out))
            for into, name in wanted
        ]
        try:
            with suppress(EarlyStop):
                seen.out = self(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return seen


@dataclass
class Recorded:
    """One batch: inputs and outputs of modules by name; the block's output, if it was run to its end.

    outputs: the tensor, or the first of a tuple; returned: what each call of a module has returned.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    out: Tensor | None = None
    returned: dict[str, list[Any]] = field(default_factory=dict)

    def residual(self, hidden: Tensor, behind: Iterable[str]) -> Tensor:
        """The residual stream [B, T, H], float32, behind modules that add to the block's input `hidden`."""
        return sum((self.outputs[name].float() for name in behind), hidden.float())


def check_reached(unseen: Collection[str]) -> None:
    """BitwrightError for modules that a recorded forward did not reach."""
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)
