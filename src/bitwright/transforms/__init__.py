"""Transforms: changes of a model before rounding that keep its function: channel scales folded into norms and matrices,
rotations, outlier channels kept in float, an output temperature.

On the command line transforms stand before a method: "gptq", "awq+gptq", "rotate+awq+gptq". A transform alone is followed by
the rounding of its paper. Imports: numerics, methods, models, calibration.
"""

from bitwright.errors import RecipeError, one_of
from bitwright.methods import METHODS
from bitwright.methods.awq import Awq
from bitwright.methods.outlier import Outlier
from bitwright.methods.rotate import Rotate
from bitwright.methods.smooth import Smooth

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
            raise RecipeError(f"unknown transform {name!r}", where=text, remedy=one_of(name, TRANSFORMS))
    if method not in METHODS:
        raise RecipeError(f"unknown method {method!r}", where=text, remedy=one_of(method, [*METHODS, *TRANSFORMS]))
    return transforms, method


__all__ = ["ALONE", "NAMES", "TRANSFORMS", "Awq", "Outlier", "Rotate", "Smooth", "Transform", "split_method"]
