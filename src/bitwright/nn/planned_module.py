"""`plan_module`: which layers of a module get 8 bits, 4 bits, bfloat16 or float, for a number of bytes."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bitwright.errors import RecipeError, SchemeError
from bitwright.nn.batches import Batch
from bitwright.nn.convert import convert
from bitwright.nn.dynamic import DYNAMIC, dynamic, nothing_to_quantize
from bitwright.nn.integer import activations_of
from bitwright.nn.plain import plain
from bitwright.nn.prepare import calibrate, prepare
from bitwright.nn.sensitivity import errors_alone, given
from bitwright.nn.tree import KEPT_AS, Bf16, Kept, copied, layers_of, quantizable, require_mode
from bitwright.numerics.scheme import TOKEN, Scheme
from bitwright.plan.allocation import Allocation, Option
from bitwright.plan.target import bytes_of

CANDIDATES = ("int4-channel", "int8-channel", "bf16", "float")


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan gives a layer. error: of the module's outputs if this layer alone has it; bytes: in the state dict."""

    name: str
    scheme: str
    bytes: int
    error: float


@dataclass(frozen=True)
class PlannedModule:
    """The arguments `keep` and `schemes` of `prepare`, and what they lead to; str() gives a table.

    bytes   of the state dict of the converted module
    error   predicted: relative squared error of the outputs, the sum over all layers
    bounds  (bytes, error) of the smallest and of the largest allocation
    """

    keep: dict[str, str]
    schemes: dict[str, str]
    layers: tuple[PlannedLayer, ...]
    bytes: int
    error: float
    bounds: tuple[tuple[int, float], tuple[int, float]]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = (f"{each.name:{width}}  {each.scheme:14} {each.bytes:>10,}  {each.error:.2e}" for each in self.layers)
        return "\n".join([*rows, f"{self.bytes:,} bytes in all, predicted error {self.error:.2e}"])


def plan_module(
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    target: int | str,
    candidates: Sequence[str] = CANDIDATES,
    activations: str = "int8-tensor-asym",
    keep: Mapping[str, str] | None = None,
) -> PlannedModule:
    """Choose a scheme, bfloat16 or float for each layer: the least predicted error of the outputs in at most `target` bytes.

    batches      inputs, on which each layer is tried in each scheme by itself (as `sensitivity` does): errors count as additive
    target       bytes of the state dict of what `convert` gives, or a text such as "300KB"; counted exactly
    candidates   schemes of weights, "bf16" and "float"; those that have no form for a layer are left out there
    activations  as for `prepare`
    keep         patterns of modules that are kept whatever it costs, as for `prepare`; they are in the result's `keep`, too

        plan = bitwright.plan_module(model, batches, target="300KB")
        prepared = bitwright.prepare(model, example, keep=plan.keep, schemes=plan.schemes)

    Raises RecipeError for a target that no allocation meets, with the smallest and the largest; otherwise as `prepare` and
    `sensitivity`.
    """
    module = quantizable(module)
    require_mode(module, training=False)
    kept, limit = given(batches), bytes_of(target, "target") if isinstance(target, str) else target
    if not candidates or len(set(candidates)) < len(candidates):
        remedy = f"such as {CANDIDATES}"
        raise RecipeError("a candidate is named twice, or none is", where=str(tuple(candidates)), remedy=remedy)
    plans = _Plans(module, kept, tuple(candidates), activations, dict(keep or {}))
    return plans.made(limit)


class _Plans:
    """A module, its layers, and the forms that each may have."""

    def __init__(
        self, module: nn.Module, batches: list[Batch], candidates: tuple[str, ...], activations: str, keep: dict[str, str]
    ) -> None:  # fmt: skip
        self.module, self.batches, self.candidates = module, batches, candidates
        self.activations, self.keep = activations, keep
        rounding = activations_of(activations)
        self.rounding = rounding if rounding.group == TOKEN else activations_of("int8-token")
        kept = Kept(module, keep)
        self.source = plain(copied(module), kept)
        self.layers = layers_of(self.source, DYNAMIC, kept)
        if not self.layers:
            raise nothing_to_quantize(module)

    def forms(self, name: str, layer: nn.Module) -> dict[str, nn.Module]:
        """What may stand in a layer's place, by candidate. The error of the last candidate if none may."""
        found: dict[str, nn.Module] = {}
        refusal: SchemeError | RecipeError | None = None
        for candidate in self.candidates:
            if candidate in KEPT_AS:
                found[candidate] = layer if candidate == "float" else Bf16(copy.deepcopy(layer))
                continue
            scheme = Scheme.parse(candidate)
            try:
                found[candidate] = dynamic(layer, scheme, self.rounding, where=name).eval()
            except (SchemeError, RecipeError) as error:  # a group that does not fit, a layer without an integer form
                refusal = error
        if not found and refusal is not None:
            raise refusal
        return found

    def made(self, limit: int) -> PlannedModule:
        """The plan for `limit` bytes."""
        bytes_of_forms = {
            name: {candidate: state_bytes(form) for candidate, form in self.forms(name, layer).items()}
            for name, layer in self.layers
        }
        ends = [[Option(*choose(of.items(), key=lambda item: item[1]), 0.0) for of in bytes_of_forms.values()]
                for choose in (min, max)]  # fmt: skip
        least, most = (self.measured(options)[1] for options in ends)
        if not least <= limit <= most:
            message = f"{', '.join(self.candidates)} reach from {least:,} to {most:,} bytes, not {limit:,}"
            remedy = "a target between them, or other candidates"
            raise RecipeError(message, where=type(self.module).__name__, remedy=remedy)
        errors = errors_alone(self.source, self.layers, self.batches, self.forms)
        allocation = Allocation(
            [[Option(c, size, errors[name][c]) for c, size in of.items()] for name, of in bytes_of_forms.items()]
        )
        found = allocation.carried_out(limit, least - allocation.least, self.measured)
        if found is None:  # each that was tried took more beside its layers than the one before
            smallest = allocation.within(allocation.least) or []
            found = self.measured(smallest)[0], smallest
        (keep, schemes, size), options = found
        given_to = tuple(
            PlannedLayer(self.own_name(name), option.scheme, option.bytes, option.loss)
            for (name, _), option in zip(self.layers, options, strict=True)
        )
        worst, best = (sum(errors[n][o.scheme] for n, o in zip(errors, end, strict=True)) for end in ends)
        return PlannedModule(
            keep, schemes, given_to, size, sum(option.loss for option in options), ((least, worst), (most, best))
        )  # fmt: skip

    def measured(self, options: Sequence[Option]) -> tuple[tuple[dict[str, str], dict[str, str], int], int]:
        """(keep, schemes, bytes): arguments of `prepare`, and exact bytes of what they lead to; and these again."""
        named = {self.own_name(name): option.scheme for (name, _), option in zip(self.layers, options, strict=True)}
        keep = {name: scheme for name, scheme in named.items() if scheme in KEPT_AS} | self.keep
        schemes = {name: scheme for name, scheme in named.items() if scheme not in KEPT_AS}
        example = self.batches[0]
        prepared = prepare(
            self.module, example, activations=self.activations, observer="minmax", keep=keep, schemes=schemes
        )  # no observer costs bytes: the quickest
        size = state_bytes(convert(calibrate(prepared, [example]), check="off"))
        return (keep, schemes, size), size

    def own_name(self, name: str) -> str:
        """A layer's name in the module as it was given: what `plain` put around it has none there."""
        known = {known for known, _ in self.module.named_modules(remove_duplicate=False)}
        while name not in known:
            name = name.rpartition(".")[0]
        return name


def state_bytes(module: nn.Module) -> int:
    """Bytes of the tensors in a module's state dict; those that share memory count once."""
    sizes = {(t.data_ptr() or id(t), t.shape): t.numel() * t.element_size() for t in module.state_dict().values()}
    return sum(sizes.values())
