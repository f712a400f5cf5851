"""RTN: round to nearest under scales from each group's extremes. The baseline of every comparison."""

from torch import Tensor

from bitwright.kernels.rounding import encode
from bitwright.methods.outcome import Outcome
from bitwright.numerics.codec import fit
from bitwright.numerics.scheme import Scheme


def rtn(w: Tensor, gram: Tensor | None, scheme: Scheme) -> Outcome:
    """w [N, K] (or a convolution's [N, ...]) rounded to nearest; the Gram is not used."""
    return Outcome(encode(w, fit(w.reshape(w.shape[0], -1), scheme), scheme))
