"""Rounding in native code: codes, the scale search and its second level, GPTQ's column loop, a sweep of coordinate
descent, AutoRound's step.

Each function takes the place of its twin in torch (codec.py, methods/search.py, superblocks.py, gptq.py,
coordinate_descent.py, autoround.py) where `handles` is true, and gives the same bits; all but the sweep, which adds in
another order, so that its codes may differ where two are equally good.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.kernels import native
from bitwright.numerics.codec import code_dtype, code_range, decode
from bitwright.numerics.codec import encode as in_torch
from bitwright.numerics.loss import energy
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import TENSOR, Scheme

ENCODINGS = ("f32", "f16", "bf16", "e8m0")  # index: the extension's number; all others are searched as f32
WIDEST = 16  # most levels of a codebook


def handles(scheme: Scheme, w: Tensor) -> bool:
    """Whether the extension is built and knows this scheme on this tensor's device."""
    levels = scheme.levels.levels
    known = levels is None or (len(levels) <= WIDEST and scheme.symmetric and scheme.levels.run == 1)
    return native is not None and w.device.type == "cpu" and scheme.group != TENSOR and known


@lru_cache(maxsize=64)
def _format(scheme: Scheme) -> object:
    """The extension's own description of a scheme."""
    assert native is not None
    grid = scheme.levels
    lo, hi = code_range(scheme)
    codes: dict[float, int] = {}
    for code, level in enumerate(grid.levels or ()):
        codes.setdefault(level, code)  # of codes of equal value only the first is used
    rising = sorted(codes.items())
    return native.Format(
        zero={"sym": 0, "signed": 0, "asym": 1, "asym1": 1, "min": 2}[scheme.zero],
        encoding=ENCODINGS.index(scheme.scale) if scheme.scale in ENCODINGS else 0,
        lo=lo,
        hi=hi,
        first=lo + (scheme.zero == "asym1"),
        reach=scheme.reach or 0.0,
        turned=scheme.zero == "signed",
        level=[level for level, _ in rising],
        code=[code for _, code in rising],
    )


def search(
    w: Tensor, importance: Tensor, scheme: Scheme, shrinks: list[tuple[float, float]], *, quick: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scales (and zeros) [N, G] of least weighted squared error, for encodings of one level: see methods/search.py.

    w [N, K]; importance [K]; shrinks: candidate factors on the range below and above 0; quick: as there. A group with a
    weight that is not finite gets the scale NaN.
    """
    assert native is not None
    scale, zero = _no_scales(w, scheme)
    native.search(
        _format(scheme),
        w.contiguous(),
        importance.contiguous(),
        *_ranges(scheme, shrinks),
        quick,
        scheme.group_length(w.shape[1]),
        scale,
        zero,
        torch.get_num_threads(),
    )
    return scale, zero


def _no_scales(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    scale = torch.empty(w.shape[0], scheme.groups(w.shape[1]))
    return scale, None if scheme.symmetric else torch.empty_like(scale)


def _ranges(scheme: Scheme, shrinks: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Candidate factors on the range below and above 0, divided by the grid's reach as the extension takes them."""
    below = [pair[0] for pair in shrinks]
    above = [pair[0] / (scheme.reach or 1.0) if scheme.symmetric else pair[1] for pair in shrinks]
    return torch.tensor(below), torch.tensor(above)


def searched(
    w: Tensor, importance: Tensor | None, scheme: Scheme, shrinks: list[tuple[float, float]], *, quick: bool = False
) -> tuple[QTensor, Tensor, Tensor]:
    """`search`, `encode` and `error_energy` in one pass over w, for encodings of one level.

    w [N, K] float32 or bfloat16; importance [K] or None.
    """
    assert native is not None
    w = w.contiguous() if w.dtype == torch.bfloat16 else w.float().contiguous()
    weight = torch.ones(w.shape[1]) if importance is None else importance.float().contiguous()
    scale, zero = _no_scales(w, scheme)
    codes, sums = torch.empty(w.shape, dtype=code_dtype(scheme)), torch.empty(2, len(w))
    native.round_rows(
        _format(scheme),
        w,
        weight,
        *_ranges(scheme, shrinks),
        quick,
        scheme.group_length(w.shape[1]),
        scale,
        zero,
        codes,
        sums,
        torch.get_num_threads(),
    )
    return QTensor(codes, Scales(scale, zero), scheme, tuple(w.shape)), sums[0].double(), sums[1].double()


def refine(
    w: Tensor, weight: Tensor, scheme: Scheme, start: Scales, moves: Tensor, integers: tuple[int, int], rounds: int
) -> Scales:
    """Refine scales of the k encodings: see methods/superblocks.py.

    moves [C, 2]: candidate steps of each group's two integers; integers: the lowest and the highest allowed.
    """
    assert native is not None and start.outer is not None
    zero, outer_zero = (None if t is None else t.clone() for t in (start.zero, start.outer_zero))
    found = Scales(start.scale.clone(), zero, start.outer.clone(), outer_zero)
    native.refine(
        _format(scheme),
        w.contiguous(),
        weight.contiguous(),
        moves,
        found.scale,
        found.zero,
        found.outer,
        found.outer_zero,
        *integers,
        scheme.group_length(w.shape[1]),
        rounds,
        torch.get_num_threads(),
    )
    return found


def encode(w: Tensor, scales: Scales, scheme: Scheme, *, importance: Tensor | None = None) -> QTensor:
    """`codec.encode`, in native code where `handles` is true."""
    if not handles(scheme, w):
        return in_torch(w, scales, scheme, importance=importance)
    assert native is not None
    matrix = w.reshape(w.shape[0], -1).float().contiguous()
    codes = torch.empty(matrix.shape, dtype=code_dtype(scheme))
    scale, zero = (None if t is None else t.contiguous() for t in (scales.scale, scales.zero))
    native.encode(
        _format(scheme), matrix, scale, zero, scheme.group_length(matrix.shape[1]), codes, torch.get_num_threads()
    )
    return QTensor(codes, scales, scheme, tuple(w.shape))


def error_energy(w: Tensor, q: QTensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """`loss.energy` of the error w − decoded and of w [N, K], each [N] float64; summed in float32, exact to six digits."""
    if not handles(q.scheme, w) or q.outliers is not None:
        return energy(w - decode(q), importance), energy(w, importance)
    assert native is not None
    weight = torch.ones(w.shape[1]) if importance is None else importance.float().contiguous()
    scale, zero = (None if t is None else t.contiguous() for t in (q.scales.scale, q.scales.zero))
    sums = torch.empty(2, len(w))
    native.missed(
        _format(q.scheme),
        w.contiguous(),
        weight,
        q.codes,
        scale,
        zero,
        q.scheme.group_length(w.shape[1]),
        sums,
        torch.get_num_threads(),
    )
    return sums[0].double(), sums[1].double()


def round_columns(
    target: Tensor,
    original: Tensor,
    propagation: Tensor,
    scheme: Scheme,
    groups: Tensor,
    scale: Tensor,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """GPTQ's inner loop: round n columns in turn and propagate each error to the later ones. Codes [n, N] and errors [n, N].

    target       [n, N] the columns plus the errors propagated so far; updated in place
    original     [n, N] the float weights; an error is original − decoded
    propagation  [n, n] share of column i's error that column k takes on: see methods/gptq.py, `Factor`
    groups       [n] int64, the row of scale (and zero) [G, N] that belongs to each column
    """
    assert native is not None
    errors = torch.empty_like(target)
    codes = torch.empty(target.shape, dtype=code_dtype(scheme))
    native.round_columns(
        _format(scheme),
        target,
        original,
        propagation.contiguous(),
        groups,
        scale,
        zero,
        codes,
        errors,
        torch.get_num_threads(),
    )
    return codes, errors


def sweep(
    decoded: Tensor,
    pull: Tensor,
    codes: Tensor,
    scheme: Scheme,
    scale: Tensor,
    zero: Tensor | None,
    H: Tensor,
    curvature: Tensor,
    *,
    ridge: float,
    solve: bool,
    begin: int,
    g: int,
) -> None:
    """One pass of coordinate descent over n columns from `begin` on, in place: see methods/coordinate_descent.py.

    decoded, pull, codes [n, N]; scale, zero [G, N]; H [n, n] without the ridge; curvature [n]: its diagonal with the
    ridge; solve: whether scales may change too; g: the group length.
    """
    assert native is not None
    native.sweep(
        _format(scheme),
        decoded,
        pull,
        codes,
        scale,
        zero,
        H.contiguous(),
        curvature,
        ridge,
        solve,
        g,
        begin,
        torch.get_num_threads(),
    )


@dataclass(frozen=True)
class RoundingVariables:
    """AutoRound's variables for one matrix; all but w, base, start and zero change in place.

    w, base         [N, K] the float weights; a constant added to each, in units of codes, so that it starts at its given code
    offset          [N, K] variable, in units of codes: added to w before it is rounded (the paper's V)
    stretch         [N, G] variable: relative change of the scale
    square, stretch_square  running means of the squared gradients of the two
    start, scale    [N, G] scales without stretch, and as stored now; zero [N, G] or None
    decoded         [N, K] float32 or bfloat16, the weights that the variables stand for
    movable         whether scales may change
    """

    scheme: Scheme
    w: Tensor
    base: Tensor
    offset: Tensor
    square: Tensor
    start: Tensor
    scale: Tensor
    stretch: Tensor
    stretch_square: Tensor
    zero: Tensor | None
    decoded: Tensor
    movable: bool


def tune(k: RoundingVariables, gradient: Tensor | None, *, rate: float, scale_rate: float, fresh: float) -> None:
    """One step of the variables against the gradient [N, K] by the decoded weights (None: no step); then decode anew.

    rate, scale_rate: step sizes of offset and stretch; fresh: weight of this gradient in the running means.
    """
    assert native is not None
    native.tune(
        _format(k.scheme),
        k.w,
        k.base,
        k.offset,
        k.square,
        k.start,
        k.scale,
        k.stretch,
        k.stretch_square,
        k.zero,
        None if gradient is None else gradient.to(k.decoded.dtype).contiguous(),
        k.decoded.detach(),
        k.scheme.group_length(k.w.shape[1]),
        k.movable,
        rate,
        scale_rate,
        fresh,
        torch.get_num_threads(),
    )
