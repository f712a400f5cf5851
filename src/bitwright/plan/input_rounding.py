"""Where layers' inputs are rounded too (W8A8, W4A8): in as many multiply-adds as a budget of KL allows.

Rounded inputs take no bytes from a file and give none back. What they bring is speed, where an engine multiplies integers, and
what they cost differs from layer to layer by orders of magnitude: channels of outliers make it. So they are a second knapsack,
after that of the weights: multiply-adds in integers are bought with KL.
"""

from collections.abc import Sequence
from math import prod

from bitwright.errors import FormatError, RecipeError
from bitwright.numerics.scheme import TOKEN, Scheme
from bitwright.plan.allocation import Allocation, Option
from bitwright.plan.run_plan import Plan
from bitwright.plan.units import Unit, fits

IN_FLOAT = ""


def input_scheme(text: str | None, kl: float | None) -> Scheme | None:
    """How inputs are to be rounded; None: nowhere. RecipeError for a range that calibration fixes, or a scheme without a KL."""
    if text is None and kl is None:
        return None
    if text is None or kl is None:
        given = "--activations" if kl is None else "--activations-kl"
        message = f"{given} by itself says nothing: inputs are rounded where that adds at most a KL"
        raise RecipeError(
            message, where=given, remedy="give both, such as --activations int8-token --activations-kl 0.005"
        )
    if not 0 < kl < float("inf"):
        raise RecipeError(
            f"a KL of {kl} buys nothing", where="--activations-kl", remedy="a number above 0, such as 0.005"
        )
    scheme = Scheme.parse(text)
    if scheme.group != TOKEN:
        message = f"a plan rounds inputs token by token, not as {scheme}"
        raise RecipeError(message, where="--activations", remedy="int8-token or fp8-token")
    return scheme


def weights_kl(kl: float, activations_kl: float | None) -> float:
    """What rounding inputs leaves of a KL for the weights. RecipeError if it is nothing."""
    left = kl - (activations_kl or 0.0)
    if left <= 0:
        message = f"of a KL of {kl:g} rounding inputs may add {activations_kl:g}: nothing is left for the weights"
        raise RecipeError(message, where="--activations-kl", remedy="a part of --kl, such as half of it")
    return left


def check_inputs(plan: Plan, units: Sequence[Unit], scheme: Scheme) -> None:
    """FormatError if the format cannot hold rounded inputs beside any choice of any unit."""
    tried = dict.fromkeys(choice.scheme for unit in units for choice in unit.choices)
    if not any(fits(plan, unit.members, choice.scheme, scheme) for unit in units for choice in unit.choices):
        message = f"{plan.format.name} holds no inputs in {scheme} beside weights in {', '.join(tried)}"
        remedy = "--format compressed-tensors or bitwright, with int4 or int8 weights"
        raise FormatError(message, where="--activations", remedy=remedy)


def rounded_inputs(
    plan: Plan, units: Sequence[Unit], chosen: Sequence[str], costs: Sequence[float | None], scheme: Scheme, kl: float
) -> list[bool]:
    """Whether each unit's inputs are rounded: as many multiply-adds as add at most `kl` together.

    chosen: the units' schemes; costs: the KL that rounding their inputs is predicted to add; None: they stay in float
    """
    options = []
    for unit, weights, cost in zip(units, chosen, costs, strict=True):
        in_float = Option(IN_FLOAT, sum(prod(t.shape) for t in unit.members), 0.0)  # for bytes: multiply-adds a token
        able = cost is not None and fits(plan, unit.members, weights, scheme)
        options.append([Option(str(scheme), 0, cost or 0.0), in_float] if able else [in_float])
    found = Allocation(options).below(kl)
    assert found is not None  # all in float add nothing
    return [option.scheme != IN_FLOAT for option in found]
