"""Reader of bitwright's own format, in numpy, by the layout in native.py; verifies what that writes.

It shares no packing code with the writer. It unpacks bits itself, and derives fp4, fp8 and the dynamic data type from their
definitions; only the levels of nf4 and the IQ types are shared constants. Types and shapes of all tensors are checked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.errors import FormatError, SchemeError
from bitwright.formats.format import Read
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import GRIDS, SUPERBLOCK, TENSOR, TOKEN, Scheme

VERSION = 1
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FP8 = torch.float8_e4m3fn
WEIGHTS_AT_ONCE = 1 << 20  # weights decoded in one step; bounds the memory
DAMAGED = "the file is damaged: get a good copy"
KEYS = {"scheme", "activations", "outliers", "rotate", "sparse", "modules"}
Floats = NDArray[np.float32]


def refuse(where: str, message: str, remedy: str = DAMAGED) -> NoReturn:
    """Raise FormatError for a module."""
    raise FormatError(message, where=where, remedy=remedy)


def check_rotation(block: int, K: int, where: str) -> None:
    """FormatError if the block size of a Hadamard rotation is no power of two, or does not divide K; 0 is no rotation."""
    if block & (block - 1) or (block and K % block):
        refuse(where, f"{K} input channels cannot be rotated in blocks of {block}", "a power of two that divides them")


# --------------------------------------------------------------------------------------------------------- the config


@dataclass(frozen=True)
class Entry:
    """The settings of one module in the quantization_config; native.py describes them."""

    scheme: Scheme
    activations: Scheme | None
    outliers: bool
    rotate: int
    sparse: bool = False


def entry_of(config: Mapping[str, Any], name: str) -> Entry:
    """The checked settings of one module.

    The config has the model's names. A file saved from the base model lacks their first part, or has one more; either matches.

    FormatError if the format version is another, or the config does not have exactly one entry for the module.
    """
    version = config.get("format_version")
    if version != VERSION or type(version) is not int:
        refuse(name, f"format_version is {version!r}, read here is {VERSION}", "use the bitwright that wrote the file")
    entries = config.get("modules")
    if not isinstance(entries, list):
        refuse(name, "the config has no list of modules")
    if not all(isinstance(entry, dict) and isinstance(entry.get("modules"), list) for entry in entries):
        refuse(name, "an entry of the config's modules has no list of names")
    found = [entry for entry in entries if name in entry["modules"]]
    found = found or [entry for entry in entries if any(_less_prefix(other, name) for other in entry["modules"])]
    if len(found) != 1:
        refuse(name, f"the config says {len(found)} times, not once, how this module is quantized")
    return _checked(found[0], name)


def _less_prefix(other: object, name: str) -> bool:
    """Whether one of two dotted names is the other without its first part."""
    return str(other).partition(".")[2] == name or name.partition(".")[2] == other


def _checked(entry: dict[str, Any], name: str) -> Entry:
    """An entry's values. FormatError for an unknown key, or a value of the wrong type."""
    unknown = sorted(map(str, entry.keys() - KEYS))
    if unknown:
        refuse(name, f"the config says things of this module that are not known here: {', '.join(unknown)}")
    outliers, rotate = entry.get("outliers", False), entry.get("rotate", 0)
    sparse = entry.get("sparse", False)
    if type(outliers) is not bool or type(rotate) is not int or type(sparse) is not bool:
        refuse(name, f"outliers {outliers!r} or sparse {sparse!r} is not true or false, or rotate {rotate!r} no block")
    scheme = _parsed(entry.get("scheme"), name)
    activations = _parsed(entry["activations"], name) if "activations" in entry else None
    if scheme.group == TOKEN or not inputs_can_be(activations):
        refuse(name, f"weights cannot be rounded to {scheme}, or inputs to {activations}")
    return Entry(scheme, activations, outliers, rotate, sparse)


def inputs_can_be(scheme: Scheme | None) -> bool:
    """Whether activations can have this scheme: per token (dynamic), or per tensor (static) without a float minimum."""
    if scheme is None or scheme.group == TOKEN:
        return True
    return scheme.group == TENSOR and scheme.zero != "min"


def _parsed(text: object, name: str) -> Scheme:
    if not isinstance(text, str):
        refuse(name, f"{text!r} is no scheme")
    try:
        return Scheme.parse(text)
    except SchemeError as error:
        raise FormatError(f"{text!r} is no scheme: {error.message}", where=name, remedy=error.remedy) from error


# -------------------------------------------------------------------------------------------------------- the tensors


@dataclass(frozen=True)
class Stored:
    """One module's tensors in a file, by suffix. FormatError for a missing tensor, or a wrong type, shape or value."""

    name: str
    read: Read

    def tensor(self, suffix: str) -> Tensor:
        """A tensor that must be there, unchecked otherwise."""
        found = self.read(suffix)
        if found is None:
            refuse(self.name, f"lacks its tensor {suffix}")
        return found

    def take(self, suffix: str, dtype: torch.dtype, *shape: int) -> NDArray[Any]:
        """A tensor that must have this type and shape, as numpy: floats as float32, float8 as bytes."""
        found = self.tensor(suffix)
        if found.dtype != dtype or tuple(found.shape) != shape:
            was = f"{found.dtype} {tuple(found.shape)}"
            refuse(self.name, f"{suffix} is {was}, where {dtype} {shape} belongs")
        if dtype == FP8:
            return found.view(torch.uint8).numpy()
        array: NDArray[Any] = (found.float() if dtype.is_floating_point else found).numpy()
        return self.finite(suffix, array)

    def finite(self, suffix: str, array: NDArray[Any]) -> NDArray[Any]:
        """The array itself. FormatError if it has NaN or Inf."""
        if not np.isfinite(array).all():
            refuse(self.name, f"{suffix} holds NaN or Inf")
        return array

    def shape(self) -> tuple[int, int]:
        """The matrix's shape (N, K)."""
        N, K = self.take("weight_shape", torch.int64, 2).tolist()
        if N < 1 or K < 1:
            refuse(self.name, f"weight_shape says {N} × {K}")
        return N, K

    def stream(self, suffix: str, bits: int, count: int) -> NDArray[np.uint8]:
        """Unpack `count` numbers [count] from a bit stream in int32 words."""
        return _numbers(self.take(suffix, torch.int32, -(-count * bits // 32))[None], bits, count)[0]

    def columns(self, K: int) -> NDArray[np.int64]:
        """The outlier channels [k], which must ascend within 0 … K − 1."""
        columns = self.take("outlier_columns", torch.int32, self.tensor("outlier_columns").numel()).astype(np.int64)
        if (np.diff(columns, prepend=-1, append=K) <= 0).any():
            refuse(self.name, f"outlier_columns do not rise within 0..{K - 1}")
        return columns


def _numbers(packed: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack int32 words [R, W] -> [R, count]: number i is in bits i·b … i·b + b − 1 of its row, in one word or two."""
    at = np.arange(count, dtype=np.int64) * bits
    low = packed.view(np.uint32).astype(np.uint64)
    high = np.pad(low[:, 1:], ((0, 0), (0, 1)))
    pairs = low | high << np.uint64(32)
    found = pairs[:, at >> 5] >> (at & 31).astype(np.uint64)
    return (found & np.uint64((1 << bits) - 1)).astype(np.uint8)


def minifloat(exponent: int, mantissa: int, bias: int) -> Floats:
    """The value of each bit pattern of a minifloat: sign, `exponent` bits, `mantissa` bits (OCP MX 1.0, 5.3)."""
    pattern = np.arange(1 << (1 + exponent + mantissa))
    e = pattern >> mantissa & (1 << exponent) - 1
    fraction = (pattern & (1 << mantissa) - 1) / (1 << mantissa)
    magnitude = np.where(e > 0, (1 + fraction) * 2.0 ** (e - bias), fraction * 2.0 ** (1 - bias))
    return np.where(pattern >> exponent + mantissa, -magnitude, magnitude).astype(np.float32)


def dynamic_type() -> Floats:
    """The 256 values of the dynamic 8-bit data type, ascending (arXiv:1511.04561): exact fractions, rounded to float32 once."""
    found = {Fraction(0), Fraction(1)}
    for decade in range(7):
        parts = 1 << decade
        for i in range(parts):
            value = (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * i + 1, 2 * parts)) * Fraction(10) ** (decade - 6)
            found |= {value, -value}
    return np.array([float(value) for value in sorted(found)], dtype=np.float32)


def _levels(scheme: Scheme) -> Floats:
    """The level of each stored code, before scaling. e4m3's NaN patterns have the largest value, ±448."""
    bits, grid = scheme.levels.bits, scheme.grid
    if grid == "fp8":
        return minifloat(4, 3, 7).clip(-448, 448)
    if grid == "fp4":
        return minifloat(2, 1, 1)
    if grid == "nf4" or grid.startswith("iq"):
        return np.array(GRIDS[grid].levels, dtype=np.float32)
    if grid == "binary":
        return np.array([-1, 1], dtype=np.float32)
    return np.arange(1 << bits, dtype=np.float32) - (0 if scheme.zero == "min" else 1 << (bits - 1))


def _table(stored: Stored, name: str, scheme: Scheme, R: int, K: int) -> Floats:
    """Scales or minima [R, G] float32. Two-level minima are stored as integers of −m."""
    G, encoding, outer = _groups(scheme, K), scheme.scale, f"{name}_outer"
    if encoding in FLOATS:
        return stored.take(name, FLOATS[encoding], R, G)
    if encoding == "e8m0":
        exponents = stored.take(name, torch.uint8, R, G).astype(np.int32)
        return np.where(exponents == 255, np.float32(0), np.ldexp(np.float32(1), exponents - 127))
    if encoding == "e4m3":
        local = minifloat(4, 3, 7)[stored.take(name, FP8, R, G)]
        local[np.abs(local) > 448] = np.nan
        return stored.finite(name, local / stored.take(outer, torch.float32, 1))
    if encoding == "dq8":
        index, absmax = stored.take(name, torch.uint8, R, G), stored.take(outer, torch.float32, -(-R * G // 256))
        each = np.repeat(absmax, 256)[: R * G].reshape(R, G)
        return dynamic_type()[index] * each + stored.take(f"{name}_mean", torch.float32, 1)
    bits = int(encoding[1:])
    integers = stored.stream(name, bits, R * G).reshape(R, G).astype(np.float32)
    integers -= 1 << (bits - 1) if scheme.symmetric else 0
    each = np.repeat(stored.take(outer, torch.float16, R, -(-K // 256)), 256 // int(scheme.group), axis=1)[:, :G]
    return -(integers * each) if name == "weight_minimum" else integers * each


def _zeros(stored: Stored, scheme: Scheme, R: int, K: int) -> Floats | None:
    """Minima or zero points [R, G]; None for a symmetric scheme."""
    if scheme.symmetric:
        return None
    if scheme.zero == "min":
        return _table(stored, "weight_minimum", scheme, R, K)
    bits, G = scheme.levels.bits, _groups(scheme, K)
    return stored.stream("weight_zero_point", bits, R * G).reshape(R, G).astype(np.float32) - (1 << (bits - 1))


def _numbers_of(
    stored: Stored, scheme: Scheme, K: int, left: NDArray[np.bool_] | None
) -> Callable[[slice], NDArray[Any]]:
    """A function that gives the stored codes of some rows [n, K]; 0 where the mask `left` [N, K] has none."""
    bits, fp8 = scheme.levels.bits, scheme.grid == "fp8"
    if left is None:
        N = stored.shape()[0]
        codes = stored.take("weight_codes", *((FP8, N, K) if fp8 else (torch.int32, N, -(-K * bits // 32))))
        return lambda here: codes[here] if fp8 else _numbers(codes[here], bits, K)
    ends = np.concatenate([[0], left.sum(1, dtype=np.int64).cumsum()])
    total = int(ends[-1])
    stream = stored.take("weight_codes", *((FP8, total) if fp8 else (torch.int32, -(-total * bits // 32))))

    def spread(here: slice) -> NDArray[Any]:
        rows = left[here]
        first, last = int(ends[here.start]), int(ends[here.start + len(rows)])
        word = first * bits // 32  # of the first code; the bits before it in that word are skipped
        found = np.zeros(rows.shape, dtype=np.uint8)
        found[rows] = stream[first:last] if fp8 else _after(stream[word:], first * bits % 32, bits, last - first)
        return found

    return spread


def _after(packed: NDArray[np.int32], skipped: int, bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack `count` numbers of int32 words [W], the first of which begins behind `skipped` bits."""
    at = skipped + np.arange(count, dtype=np.int64) * bits
    low = packed[: (skipped + count * bits) // 32 + 2].view(np.uint32).astype(np.uint64)
    pairs = low | np.append(low[1:], np.uint64(0)) << np.uint64(32)
    found = pairs[at >> 5] >> (at & 31).astype(np.uint64) if count else low[:0]
    return (found & np.uint64((1 << bits) - 1)).astype(np.uint8)


def _mask(stored: Stored, N: int, K: int) -> NDArray[np.bool_]:
    """The weights [N, K] that are stored; all others are 0."""
    packed = stored.take("weight_mask", torch.int32, N, -(-K // 32))
    return np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, :K].astype(np.bool_)


def _weights(stored: Stored, entry: Entry, N: int, K: int) -> Floats:
    """Dequantize to [N, K] float32, some rows at a time. FormatError for a result that is not finite."""
    scheme = entry.scheme
    left = _mask(stored, N, K) if entry.sparse else None
    levels, R = _levels(scheme), 1 if scheme.group == TENSOR else N
    some = max(1, WEIGHTS_AT_ONCE // K)
    numbers = _numbers_of(stored, scheme, K, left)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        scale, zero = _table(stored, "weight_scale", scheme, R, K), _zeros(stored, scheme, R, K)
        w = np.empty((N, K), dtype=np.float32)
        for here in (slice(n, n + some) for n in range(0, N, some)):
            v = levels[numbers(here)]
            if scheme.grid == "ternary" and (v < -1)[... if left is None else left[here]].any():
                refuse(stored.name, "weight_codes holds a code that stands for nothing")
            s = _spread(scale, scheme, K, here)
            if zero is None:
                w[here] = v * s
            else:
                z = _spread(zero, scheme, K, here)
                w[here] = v * s + z if scheme.zero == "min" else (v - z) * s
            if left is not None:
                w[here][~left[here]] = 0
    return stored.finite("what its weights decode to", w)


def scales_of(entry: Entry, stored: Stored) -> Scales:
    """The scales and zero points (or minima) of one module's matrix, [R, G] each."""
    N, K = stored.shape()
    R = 1 if entry.scheme.group == TENSOR else N
    zero = _zeros(stored, entry.scheme, R, K)
    scale = torch.from_numpy(_table(stored, "weight_scale", entry.scheme, R, K))
    return Scales(scale, None if zero is None else torch.from_numpy(zero), *_second_level(stored, entry.scheme, R, K))


def _second_level(stored: Stored, scheme: Scheme, R: int, K: int) -> tuple[Tensor | None, Tensor | None]:
    """What scales, and minima, stand under, as in `Scales`."""
    encoding, name = scheme.scale, "weight_scale_outer"
    if encoding in FLOATS or encoding == "e8m0":
        return None, None
    if encoding == "e4m3":
        return torch.from_numpy(stored.take(name, torch.float32, 1)).view(1, 1), None
    if encoding == "dq8":
        absmax = stored.take(name, torch.float32, -(-R * _groups(scheme, K) // SUPERBLOCK))
        mean = stored.take("weight_scale_mean", torch.float32, 1)
        return torch.from_numpy(absmax).view(-1, 1), torch.from_numpy(mean).view(1, 1)
    names = (name, "weight_minimum_outer") if scheme.zero == "min" else (name,)
    found = [torch.from_numpy(stored.take(each, torch.float16, R, -(-K // SUPERBLOCK))) for each in names]
    return found[0], found[1] if len(found) > 1 else None


def matrix(entry: Entry, stored: Stored) -> Floats:
    """Dequantize one module's tensors to the matrix [N, K], outlier channels included."""
    N, K = stored.shape()
    w = _weights(stored, entry, N, K)
    if entry.outliers:
        columns, found = stored.columns(K), stored.tensor("outlier_weight").dtype
        dtype = found if found in FLOATS.values() else torch.float32
        w[:, columns] = stored.take("outlier_weight", dtype, N, len(columns))
    return w


def _groups(scheme: Scheme, K: int) -> int:
    """G, the number of groups along K."""
    return -(-K // scheme.group) if isinstance(scheme.group, int) else 1


def _spread(table: Floats, scheme: Scheme, K: int, here: slice) -> Floats:
    """Expand one value for each group to one for each weight of some rows (or a shape that broadcasts to it)."""
    part = table if scheme.group == TENSOR else table[here]
    return np.repeat(part, scheme.group, axis=1)[:, :K] if isinstance(scheme.group, int) else part


def static_range(stored: Stored, scheme: Scheme | None) -> Scales | None:
    """The scale and zero point of static activations; None for dynamic or float activations."""
    if scheme is None or scheme.group != TENSOR:
        return None
    scale = torch.from_numpy(stored.take("input_scale", torch.float32, 1)).view(1, 1)
    if scheme.zero == "sym":
        return Scales(scale)
    return Scales(scale, torch.from_numpy(stored.take("input_zero_point", torch.int32, 1)).float().view(1, 1))
