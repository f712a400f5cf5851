"""The arithmetic of number formats: fit scales, snap them to their encoding, encode, decode.

The scale encoding is applied *before* rounding: `snap` rounds wanted scales to those that will be read back from the
file, and codes are only ever chosen against those. So `decode` gives the same bits in memory and from every file
format, and GPTQ's error feedback works in all of them.

Axes: w [N, K], groups of g along K, scale [N, G] with G = ceil(K / g). Everything is float32 and pure.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.numerics import lattice
from bitwright.numerics.qtensor import QTensor, Scales, unpermuted
from bitwright.numerics.scheme import CHANNEL, SUPERBLOCK, TENSOR, Scheme


def is_signed(scheme: Scheme) -> bool:
    """Whether codes are signed (int8) or unsigned (uint8: indices into a codebook, and codes over a minimum)."""
    return scheme.levels.levels is None and scheme.zero != "min"


def code_range(scheme: Scheme) -> tuple[int, int]:
    """The lowest and the highest code."""
    grid = scheme.levels
    return (0, grid.hi - grid.lo) if scheme.zero == "min" else (grid.lo, grid.hi)


def group_view(w: Tensor, scheme: Scheme) -> Tensor:
    """w [N, K] -> [N, G, g], a short last group padded with zeros; [1, 1, N·K] for group "tensor"."""
    if scheme.group == TENSOR:
        return w.reshape(1, 1, -1)
    if scheme.group == CHANNEL:
        return w[:, None, :]
    g = scheme.group_length(w.shape[1])
    return (torch.nn.functional.pad(w, (0, -w.shape[1] % g)) if w.shape[1] % g else w).unflatten(1, (-1, g))


def per_column(per_group: Tensor, scheme: Scheme, K: int) -> Tensor:
    """A value per group [N, G] -> a value per weight [N, K] (or a shape that broadcasts to it)."""
    if isinstance(scheme.group, str):
        return per_group
    return per_group.repeat_interleave(scheme.group, dim=1)[:, :K]


# ---------------------------------------------------------------------------------------------------------------- fit


def fit(w: Tensor, scheme: Scheme, *, shrink: Tensor | float = 1.0, outer: Tensor | None = None) -> Scales:
    """Scales from each group's extremes, narrowed by `shrink`, snapped to the scheme's encoding.

    w       [N, K]
    shrink  factor on the range, a number or [N, G]; below 1 it clips outliers for finer steps
    outer   NVFP4's divisor of the whole tensor, if fixed beforehand (e4m3)

    >>> q = fit(torch.tensor([[-7.59, 10.8]]), Scheme.parse("int8-tensor-asym"))
    >>> q.zero.item(), round(q.scale.item(), 3)
    (-23.0, 0.072)
    """
    scale, zero = raw_scales(group_view(w.float(), scheme), w.shape[1], scheme, shrink)
    return snap(scale, zero, scheme, outer=outer)


def raw_scales(
    v: Tensor, K: int, scheme: Scheme, shrink: Tensor | float = 1.0, above: Tensor | float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales from each group's extremes, not yet rounded to an encoding: v [N, G, g] -> scale [N, G], zero [N, G] or None.

    shrink: a factor on the range; above: a factor of its own for the positive part, where a scheme has an offset.
    """
    grid = scheme.levels
    if scheme.symmetric:
        if scheme.reach is not None:
            largest = v.abs().amax(-1) * (shrink / scheme.reach)
            if scheme.zero == "signed":  # codes reach further below 0: the scale's sign turns the largest weight there
                largest = torch.where(v.amax(-1) > -v.amin(-1), -largest, largest)
            return largest, None
        counts = torch.full(v.shape[1:2], float(v.shape[2]))
        if isinstance(scheme.group, int) and K % scheme.group:
            counts[-1] = K % scheme.group
        return pairwise_sum(v.abs()) / counts.to(v.device) * shrink, None
    low = v.amin(-1).clamp(max=0) * shrink
    high = v.amax(-1).clamp(min=0) * (shrink if above is None else above)
    scale = (high - low) / (grid.hi - grid.lo)
    if scheme.zero == "min":
        return scale, low
    return scale, integer_zero(low, scale, scheme)


def pairwise_sum(x: Tensor) -> Tensor:
    """Pairwise sum over the last axis, in the order in which the native kernels add: the same bits."""
    n = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, n - x.shape[-1])) if n > x.shape[-1] else x
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def integer_zero(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The zero point: the code that stands for 0 when the lowest code stands for `low`; all [N, G]."""
    grid = scheme.levels
    first = grid.lo + (scheme.zero == "asym1")
    return (grid.lo - torch.round(low / safe(scale))).clamp(first, grid.hi)


def same_sign(x: Tensor, y: Tensor) -> Tensor:
    """Where both are above 0, or both below."""
    return ((x > 0) & (y > 0)) | ((x < 0) & (y < 0))


def safe(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where a group is all zeros or its scale vanished in the encoding."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


# --------------------------------------------------------------------------------------------------------------- snap


def snap(scale: Tensor, zero: Tensor | None, scheme: Scheme, *, outer: Tensor | None = None) -> Scales:
    """Round scales (and minima) [N, G] to what the scheme's encoding can hold; `outer` fixes e4m3's divisor.

    Raises SchemeError for a scale that is NaN or infinite.
    """
    if not torch.isfinite(scale).all():
        remedy = "look for NaN or Inf in the weights: get a good copy of the checkpoint"
        raise SchemeError(
            f"{int((~torch.isfinite(scale)).sum())} of {scale.numel()} scales are not finite", remedy=remedy
        )
    encoding = scheme.scale
    if encoding in _FLOATS:
        low, high = torch.finfo(_FLOATS[encoding]).smallest_normal, torch.finfo(_FLOATS[encoding]).max
        rounded = _to_float(scale, encoding, low, high)
        return Scales(
            rounded, _to_float(zero, encoding, 0.0, high) if scheme.zero == "min" and zero is not None else zero
        )
    if encoding == "e8m0":
        mantissa, exponent = torch.frexp(scale.abs())
        exponent = (exponent - (mantissa < math.sqrt(0.5)).int()).clamp(-127, 127)
        return Scales(torch.where(scale == 0, scale, torch.exp2(exponent.float())), zero)
    if encoding == "e4m3":
        return _snap_e4m3(scale, zero, outer)
    if encoding == "dq8":
        return _snap_dq8(scale, zero)
    return _snap_k(scale, zero, scheme)


_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _to_float(x: Tensor, encoding: str, low: float, high: float) -> Tensor:
    """x rounded to the float type, |x| clamped to its normal numbers; exact zeros stay."""
    bounded = torch.where(x == 0, x, x.sign() * x.abs().clamp(low, high))
    return bounded.to(_FLOATS[encoding]).float()


def _snap_e4m3(scale: Tensor, zero: Tensor | None, outer: Tensor | None) -> Scales:
    """NVFP4's two levels: scale = e4m3 / divisor, with one divisor a tensor, which maps the largest scale to 448."""
    if outer is None:
        outer = (448.0 / safe(scale.max())).clamp(max=torch.finfo(torch.float32).max).reshape(1, 1)
    local = (scale * outer).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return Scales(local / outer, zero, outer)


def _snap_k(scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Scales:
    """The k-quants' two levels: integers of 8, 6 or 4 bits under one f16 per 256 weights (llama.cpp's block_q*_K).

    "signed": integers of either sign, the largest scale mapped to the lowest; "sym": integers from 0 on; "min": unsigned
    integers for scales and minima both.
    """
    low, high = scale_range(scheme)
    scale, outer = _two_level(scale, low, high, scheme)
    if zero is None or scheme.zero != "min":
        return Scales(scale, zero, outer)
    minimum, outer_zero = _two_level(-zero, low, high, scheme)
    return Scales(scale, -minimum, outer, outer_zero)


def scale_range(scheme: Scheme) -> tuple[int, int]:
    """The lowest and the highest integer that stores a scale of the k encodings."""
    bits = int(scheme.scale[1:])
    if scheme.levels.odd:
        return 1, scheme.levels.odd
    if scheme.zero == "min":
        return 0, (1 << bits) - 1
    half = 1 << (bits - 1)
    return (-half if scheme.zero == "signed" else 0), half - 1


def by_block(x: Tensor, scheme: Scheme) -> Tensor:
    """Scales [..., G] of the k encodings grouped by super-block: [..., S, 256 / g], padded with zeros."""
    assert isinstance(scheme.group, int)  # Scheme refuses anything else
    per_block = SUPERBLOCK // scheme.group
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % per_block)).unflatten(-1, (-1, per_block))


def each_group(blocks: Tensor, scheme: Scheme, G: int) -> Tensor:
    """A value per super-block [N, S] -> a value per group [N, G]."""
    assert isinstance(scheme.group, int)
    return blocks.repeat_interleave(SUPERBLOCK // scheme.group, dim=1)[:, :G]


def integers_of(table: Tensor, outer: Tensor, scheme: Scheme) -> Tensor:
    """The stored integers, as floats, of scales (or minima) [N, G] under the super-blocks' f16 scales [N, S]."""
    return torch.round(table / safe(each_group(outer, scheme, table.shape[1])))


def _two_level(x: Tensor, low: int, high: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Round x [N, G] to integers low..high times an f16 per super-block; also that f16 [N, S]."""
    blocks = by_block(x, scheme)
    largest, odd = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0], scheme.levels.odd
    outer = largest / (odd or low or high)
    outer = outer.clamp(-65504, 65504).half().float()
    wanted = blocks / safe(outer)[..., None]
    integers = 2 * torch.round((wanted - 1) / 2) + 1 if odd else torch.round(wanted)
    integers = integers.clamp(low, high) + 0.0  # no -0: a file holds none
    return (integers * outer[..., None]).flatten(1)[:, : x.shape[1]], outer


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed 8-bit dynamic data type (Dettmers, arXiv:1511.04561), sorted.

    The midpoints of 2^(6-i) equal parts of the decade below 10^-i, i = 0 … 6, with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, (1 << exponent) + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _snap_dq8(scale: Tensor, zero: Tensor | None) -> Scales:
    """QLoRA's double quantization (arXiv:2305.14314, section 3): scales minus their mean, in 8 bits, by blocks of 256."""
    mean = scale.mean().reshape(1, 1)
    flat = (scale - mean).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    absmax = blocks.abs().amax(-1, keepdim=True)
    table = dynamic_map().to(scale.device)
    codes = nearest(blocks / safe(absmax), table)
    snapped = (table[codes] * absmax).view(-1)[: flat.numel()].view(scale.shape) + mean
    return Scales(snapped, zero, absmax, mean)


def dq8_index(scale: Tensor, absmax: Tensor, mean: Tensor) -> Tensor:
    """What is stored of scales [N, G] that stand under absmax [blocks, 1] and a mean [1, 1]: uint8 [N, G].

    The first entry of the map that gives exactly this scale: where the mean is large, several may.
    """
    flat = scale.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
    meanings = dynamic_map().to(scale.device) * absmax + mean  # [B, 256], rising
    index = torch.searchsorted(meanings, blocks).clamp(max=SUPERBLOCK - 1)
    return index.view(-1)[: flat.numel()].view(scale.shape).to(torch.uint8)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of a sorted table; ties go down."""
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


# ------------------------------------------------------------------------------------------------------ encode, decode


def choose(x: Tensor, scheme: Scheme) -> Tensor:
    """The codes nearest to x = w / s (+ z), any shape; a float or integer tensor."""
    grid = scheme.levels
    if grid.levels is None:
        low, high = code_range(scheme)
        return torch.round(x).clamp_(low, high)
    if scheme.grid == "fp8":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    order, table = _sorted_levels(grid.levels)
    return order.to(x.device)[nearest(x, table.to(x.device))]


@lru_cache(maxsize=8)
def _sorted_levels(levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Codes in rising order of their value, and those values; of codes of equal value only the first."""
    unique = sorted({value: code for code, value in reversed(list(enumerate(levels)))}.items())
    return torch.tensor([code for _, code in unique]), torch.tensor([value for value, _ in unique])


def values(codes: Tensor, scheme: Scheme) -> Tensor:
    """v(c): the number each code stands for before scaling, float32."""
    levels = scheme.levels.levels
    return codes.float() if levels is None else torch.tensor(levels, device=codes.device)[codes.long()]


def round_to(
    w: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scheme: Scheme,
    *,
    inverse: bool = False,
    importance: Tensor | None = None,
    free: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes and decoded weights for w under scales that broadcast to it: the one place where rounding happens.

    inverse     multiply by 1 / scale, which is faster than dividing; ties may then round the other way (fit for searches)
    importance  weights of the squared errors, where a codebook's entry is chosen for a run of codes (the last axis of w)
    free        choose each code by itself though codes come in runs: right for w that was decoded from such codes
    """
    if scheme.levels.run > 1 and not free:
        codes = lattice.nearest(w / safe(scale), scheme.grid, importance)
        return codes, values(codes, scheme) * scale
    divisor = 1 / safe(scale) if inverse else safe(scale)
    over = torch.mul if inverse else torch.div
    if zero is None:
        codes = choose(over(w, divisor), scheme)
        return codes, values(codes, scheme) * scale
    if scheme.zero == "min":
        codes = choose(over(w - zero, divisor), scheme)
        return codes, codes * scale + zero
    codes = choose(over(w, divisor) + zero, scheme)
    return codes, (codes - zero) * scale


def encode(
    w: Tensor, scales: Scales, scheme: Scheme, *, importance: Tensor | None = None, free: bool = False
) -> QTensor:
    """Round w (any shape, first axis N) to the nearest codes under scales that are fixed.

    importance [K] and free: as for `round_to`.

    >>> w = torch.tensor([[3.08, 3.02, -10.8]])
    >>> encode(w, fit(w, Scheme.parse("int8-channel-f32")), Scheme.parse("int8-channel-f32")).codes.tolist()
    [[36, 36, -127]]
    """
    matrix = w.reshape(w.shape[0], -1).float()
    zero = None if scales.zero is None else scales.zero[..., None]
    weight = None if importance is None or scheme.group == TENSOR else group_view(importance[None].float(), scheme)
    codes, _ = round_to(group_view(matrix, scheme), scales.scale[..., None], zero, scheme, importance=weight, free=free)
    codes = codes.to(code_dtype(scheme)).reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return QTensor(codes.contiguous(), scales, scheme, tuple(w.shape))


def code_dtype(scheme: Scheme) -> torch.dtype:
    """int8 or uint8: see `is_signed`."""
    return torch.int8 if is_signed(scheme) else torch.uint8


def decode(q: QTensor) -> Tensor:
    """The weights that codes and scales stand for, float32, in the source's shape."""
    v = group_view(values(q.codes, q.scheme), q.scheme)
    scale, zero = q.scales.scale[..., None], None if q.scales.zero is None else q.scales.zero[..., None]
    if zero is None:
        v = v.mul_(scale)
    elif q.scheme.zero == "min":
        v = v.mul_(scale).add_(zero)
    else:
        v = v.sub_(zero).mul_(scale)
    w = unpermuted(v.reshape(len(q.codes), -1)[:, : q.codes.shape[1]], q.order)
    if q.outliers is not None:
        w[:, q.outliers.columns] = q.outliers.weight.float()
    return w.reshape(q.shape)


def rounded(x: Tensor, scheme: Scheme, scales: Scales | None = None) -> Tensor:
    """Activations x [..., K] (or a matrix) rounded to `scheme` and decoded again: what the engine multiplies.

    scales: fixed by calibration (static); None: from x itself (dynamic), token by token where the group is "token".

    >>> rounded(torch.tensor([[0.34, -12.7], [0.34, 2.54]]), Scheme.parse("int8-token"))
    tensor([[  0.3000, -12.7000],
            [  0.3400,   2.5400]])
    """
    if not x.numel():
        return x
    matrix = x.reshape(-1, x.shape[-1]).float()
    scales = scales or fit(matrix, scheme)
    zero = None if scales.zero is None else scales.zero[..., None]
    _, decoded = round_to(group_view(matrix, scheme), scales.scale[..., None], zero, scheme)
    return decoded.reshape(len(matrix), -1)[:, : matrix.shape[1]].reshape(x.shape).to(x.dtype)
