"""How to choose codes: (w, gram, scheme, *, options) -> Outcome."""

from collections.abc import Callable

from bitwright.methods.gptq import gptq
from bitwright.methods.outcome import Outcome
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search

METHODS: dict[str, Callable[..., Outcome]] = {"rtn": rtn, "search": search, "gptq": gptq}
CALIBRATED = ("gptq",)  # methods that cannot do without a Gram; all of them have the option `fast`

__all__ = ["CALIBRATED", "METHODS", "Outcome", "gptq", "rtn", "search"]
