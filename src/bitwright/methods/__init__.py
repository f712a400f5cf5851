"""How to choose codes, pure: (w, gram, scheme, *, options) -> Outcome. One file a method; `METHODS` is the table of them. In it
all but RTN leave weights alone that lie on the scheme's grid already (exact.py).

Imports: errors, numerics, kernels.
"""

from collections.abc import Callable

from bitwright.errors import RecipeError
from bitwright.methods.autoround import autoround
from bitwright.methods.exact import keep_exact
from bitwright.methods.gptaq import gptaq
from bitwright.methods.gptq import gptq
from bitwright.methods.hqq import hqq
from bitwright.methods.obq import obq
from bitwright.methods.outcome import Outcome
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search
from bitwright.numerics.scheme import TOKEN, Scheme

METHODS: dict[str, Callable[..., Outcome]] = {
    "rtn": rtn,
    "search": keep_exact(search),
    "hqq": keep_exact(hqq),
    "obq": keep_exact(obq),
    "gptq": keep_exact(gptq),
    "gptaq": keep_exact(gptaq),
    "autoround": keep_exact(autoround),
}
CALIBRATED = ("obq", "gptq", "gptaq", "autoround")  # need a Gram; all of them take the option `fast`
BLOCKWISE = ("autoround",)  # then tune all matrices of a block together
ASYMMETRIC = ("gptaq", "autoround")  # compare with the float model's activations; take `drift` and `residual`
IN_RUNS = ("gptq", "gptaq", "search", "rtn")  # choose entries of a codebook for runs of codes


def check_serves(method: str, scheme: Scheme, *, where: str = "") -> None:
    """RecipeError, of `where`, for a scheme that weights cannot have, or that the method cannot choose codes for."""
    if scheme.group == TOKEN:
        message = f"{scheme} is for activations: weights have no tokens"
        remedy = "give --scheme int8-channel, or --activations for this one"
    elif method == "autoround" and scheme.levels.levels is not None:
        message = f"autoround tunes integer codes, not {scheme.grid}"
        remedy = "give int2 to int8, or --method gptaq"
    elif scheme.levels.run > 1 and method not in IN_RUNS:
        message = f"{method} chooses codes one by one, those of {scheme.grid} come in runs of {scheme.levels.run}"
        remedy = f"use --method {' or '.join(IN_RUNS)}"
    elif method == "hqq" and scheme.zero != "min":
        message = f"hqq tunes float minima, and {scheme} has none"
        remedy = "give --scheme q4_1, or --method search"
    else:
        return
    raise RecipeError(message, where=where, remedy=remedy)


__all__ = [
    "ASYMMETRIC", "BLOCKWISE", "CALIBRATED", "METHODS", "Outcome", "autoround", "check_serves", "gptaq", "gptq", "hqq", "obq",
    "rtn", "search",
]  # fmt: skip
