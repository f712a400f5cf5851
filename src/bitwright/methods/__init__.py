"""How to choose codes: (w, gram, scheme, *, options) -> Outcome."""

from collections.abc import Callable

from bitwright.methods.autoround import autoround
from bitwright.methods.gptaq import gptaq
from bitwright.methods.gptq import gptq
from bitwright.methods.hqq import hqq
from bitwright.methods.obq import obq
from bitwright.methods.outcome import Outcome
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search

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
ASYMMETRIC = ("gptaq", "autoround")  # also look at the float model's activations; have the option `cross`

__all__ = [
    "ASYMMETRIC", "BLOCKWISE", "CALIBRATED", "METHODS", "Outcome", "autoround", "gptaq", "gptq", "hqq", "obq", "rtn",
    "search",
]  # fmt: skip
