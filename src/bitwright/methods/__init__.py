"""How to choose codes: (w, gram, scheme, *, options) -> Outcome. And what may be done to a matrix before: transforms.

A method is named by itself, behind transforms where there are some: "gptq", "awq+gptq", "rotate+awq+gptq". A transform
that stands alone is followed by the rounding that its paper used.
"""

from collections.abc import Callable

from bitwright.errors import RecipeError
from bitwright.methods.autoround import autoround
from bitwright.methods.awq import Awq
from bitwright.methods.gptaq import gptaq
from bitwright.methods.gptq import gptq
from bitwright.methods.hqq import hqq
from bitwright.methods.obq import obq
from bitwright.methods.outcome import Outcome
from bitwright.methods.outlier import Outlier
from bitwright.methods.rotate import Rotate
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search
from bitwright.methods.smooth import Smooth
from bitwright.numerics.scheme import Scheme

METHODS: dict[str, Callable[..., Outcome]] = {
    "rtn": rtn,
    "search": search,
    "hqq": hqq,
    "obq": obq,
    "gptq": gptq,
    "gptaq": gptaq,
    "autoround": autoround,
}
CALIBRATED = ("obq", "gptq", "gptaq", "autoround")  # cannot do without a Gram; all of them have the option `fast`
BLOCKWISE = ("autoround",)  # go on to tune a whole block
ASYMMETRIC = ("gptaq", "autoround")  # also look at the float model's activations; have `drift` and `residual`

Transform = Rotate | Awq | Smooth | Outlier
TRANSFORMS: dict[str, type[Transform]] = {"rotate": Rotate, "awq": Awq, "smooth": Smooth, "outlier": Outlier}
ALONE = {"rotate": "rtn", "awq": "search", "smooth": "rtn", "outlier": "rtn"}
NAMES = {kind: name for name, kind in TRANSFORMS.items()}


def split_method(text: str) -> tuple[list[str], str]:
    """ "awq+gptq" -> (["awq"], "gptq"); "awq" -> (["awq"], "search"). RecipeError for a name that is neither."""
    *transforms, method = text.split("+")
    if method in TRANSFORMS:
        transforms, method = [*transforms, method], ALONE[method]
    for name in transforms:
        if name not in TRANSFORMS:
            raise RecipeError(f"unknown transform {name!r}", where=text, remedy=f"one of {', '.join(TRANSFORMS)}")
    if method not in METHODS:
        raise RecipeError(
            f"unknown method {method!r}", where=text, remedy=f"one of {', '.join([*METHODS, *TRANSFORMS])}"
        )
    return transforms, method


def check_serves(method: str, scheme: Scheme) -> None:
    """RecipeError for a method on a scheme that it cannot choose codes for."""
    if method == "autoround" and scheme.levels.levels is not None:
        raise RecipeError(f"autoround tunes integer codes, not {scheme.grid}", remedy="int2 to int8, or method gptaq")
    if method == "hqq" and scheme.zero != "min":
        remedy = "a min scheme such as q4_1, or method search"
        raise RecipeError(f"hqq tunes float minima, and {scheme} has none", remedy=remedy)


__all__ = [
    "ALONE", "ASYMMETRIC", "BLOCKWISE", "CALIBRATED", "METHODS", "NAMES", "TRANSFORMS", "Awq", "Outcome", "Outlier",
    "Rotate", "Smooth", "Transform", "autoround", "check_serves", "gptaq", "gptq", "hqq", "obq", "rtn", "search",
    "split_method",
]  # fmt: skip
