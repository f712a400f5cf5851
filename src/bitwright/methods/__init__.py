"""How to choose codes: (w, gram, scheme, *, options) -> Outcome."""

from collections.abc import Callable

from bitwright.methods.autoround import autoround
from bitwright.methods.gptaq import gptaq
from bitwright.methods.gptq import gptq
from bitwright.methods.outcome import Outcome
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search

METHODS: dict[str, Callable[..., Outcome]] = {
    "rtn": rtn,
    "search": search,
    "gptq": gptq,
    "gptaq": gptaq,
    "autoround": autoround,
}
CALIBRATED = ("gptq", "gptaq", "autoround")  # methods that cannot do without a Gram; all of them have the option `fast`

BLOCKWISE = ("autoround",)  # methods that go on to tune a whole block
ASYMMETRIC = ("gptaq", "autoround")  # methods that also look at the float model's activations; options `cross`

__all__ = ["ASYMMETRIC", "BLOCKWISE", "CALIBRATED", "METHODS", "Outcome", "autoround", "gptaq", "gptq", "rtn", "search"]
