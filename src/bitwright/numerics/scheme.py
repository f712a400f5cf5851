"""Scheme: what a number format is, as four independent parts, and its text.

A quantized weight is codes + group scales (+ zeros). A scheme says which numbers one code can stand for (grid), how many
neighbours along K share a scale (group), whether there is an offset (zero), and how the scales themselves are stored
(scale). Q4_K, NF4 with double quantization, MXFP4 and plain int8 per channel are rows of one table, not code paths.

    text    = preset | grid "-" group ["-" zero] ["-" scale]
    group   = "g" number | "channel" | "tensor" | "token"

>>> Scheme.parse("int4-g128-asym")
Scheme(grid='int4', group=128, zero='asym', scale='f16')
>>> str(Scheme.parse("int4-g128-asym-f16")), str(Scheme.parse("int4-g32-min-k6")), Scheme.parse("q4_k").bits_per_weight(256)
('int4-g128-asym', 'q4_k', 4.5)
"""

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, Self

import torch

from bitwright.errors import SchemeError

Zero = Literal["sym", "signed", "asym", "asym1", "min"]
CHANNEL, TENSOR, TOKEN = "channel", "tensor", "token"
SUPERBLOCK = 256  # weights under one f16 scale in the k encodings; scales in one block of dq8


@dataclass(frozen=True)
class Grid:
    """The numbers that one code stands for, before scaling.

    levels  values by code, for a codebook; None: the code is its own value, `lo..hi`
    reach   the value that the largest |w| of a group is mapped to. At 8 bits 127, as in absmax / 127; below, half a step
            beyond the last code: the extreme still rounds within half a step, and all others gain finer steps.
            None: the scale is the mean |w| (BitNet)
    run     neighbours along K whose codes are chosen together, as one entry of a codebook (see numerics/lattice.py); 1: each
            code is free
    odd     scales of a super-block are odd multiples, up to this one, of its f16; 0: any multiple
    """

    bits: int
    lo: int
    hi: int
    reach: float | None
    levels: tuple[float, ...] | None = None
    run: int = 1
    odd: int = 0

    @property
    def lopsided(self) -> bool:
        """Whether the negative values are other than the positive ones, as in −8..7."""
        if self.levels is None:
            return self.lo != -self.hi
        return sorted(self.levels) != sorted(-level for level in self.levels)


def _uniform(bits: int) -> Grid:
    half = 1 << (bits - 1)
    return Grid(bits, -half, half - 1, 127.0 if bits == 8 else half - 0.5)


def _codebook(bits: int, levels: tuple[float, ...], reach: float | None) -> Grid:
    return Grid(bits, 0, len(levels) - 1, reach, levels)


# QLoRA (arXiv:2305.14314), appendix E: quantiles of N(0, 1), zero among them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# OCP Microscaling 1.0: sign, two exponent bits, one mantissa bit; the index is the bit pattern.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# llama.cpp's IQ4_NL and IQ4_XS.
_IQ4NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
# Magnitudes in the lattices of llama.cpp's IQ1, IQ2 and IQ3 types, in units of a group's scale. The grids named after those
# types allow only the combinations in their codebooks; in iq1, iq2, iq3xxs and iq3s each code is free.
_IQ1 = (0.125, 0.875, 1.125)
_IQ2 = (1.0, 3.125, 5.375)
_IQ3XXS = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.5)
_IQ3S = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)


def _either_sign(magnitudes: tuple[float, ...], *, run: int = 1, odd: int = 0) -> Grid:
    levels = (*(-level for level in reversed(magnitudes)), *magnitudes)
    return Grid((len(levels) - 1).bit_length(), 0, len(levels) - 1, magnitudes[-1], levels, run, odd)


def _fp8_levels() -> tuple[float, ...]:
    """OCP FP8 e4m3: the index is the bit pattern; the two NaN patterns repeat the largest finite value."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(128)
    return tuple(torch.where(values.isnan(), 448.0 * signs, values).tolist())


GRIDS: dict[str, Grid] = {
    **{f"int{bits}": _uniform(bits) for bits in range(2, 9)},
    "nf4": _codebook(4, _NF4, 1.0),
    "fp4": _codebook(4, _FP4, 6.0),
    "fp8": _codebook(8, _fp8_levels(), 448.0),
    "iq4nl": _codebook(4, _IQ4NL, 113.0),
    "iq1": _either_sign(_IQ1),
    "iq2": _either_sign(_IQ2),
    "iq3xxs": _either_sign(_IQ3XXS),
    "iq3s": _either_sign(_IQ3S),
    "iq1_s": _either_sign(_IQ1, run=32, odd=15),
    "iq1_m": _either_sign(_IQ1, run=8, odd=15),
    "iq2_xxs": _either_sign(_IQ2, run=8, odd=31),
    "iq2_xs": _either_sign(_IQ2, run=8, odd=31),
    "iq2_s": _either_sign(_IQ2, run=8, odd=31),
    "iq3_xxs": _either_sign(_IQ3XXS, run=8, odd=31),
    "iq3_s": _either_sign(_IQ3S, run=4, odd=31),
    "ternary": Grid(2, -1, 1, None),
    "binary": _codebook(1, (-1.0, 1.0), None),
}
GROUPS = (16, 32, 64, 128, 256)
ZEROS = ("sym", "signed", "asym", "asym1", "min")
# Bits per stored scale. k8, k6 and k4 add one f16 a super-block, dq8 one f32 in 256 scales, e4m3 one f32 a tensor.
SCALE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "e8m0": 8, "e4m3": 8, "k8": 8, "k6": 6, "k4": 4, "dq8": 8}
DEFAULT_SCALE = {"nf4": "f32", "fp8": "f32", TOKEN: "f32"}  # by grid or group; all others: f16
PRESETS = {
    "mxfp4": "fp4-g32-sym-e8m0",
    "nvfp4": "fp4-g16-sym-e4m3",
    "q2_k": "int2-g16-min-k4",
    "q3_k": "int3-g16-signed-k6",
    "q4_k": "int4-g32-min-k6",
    "q5_k": "int5-g32-min-k6",
    "q6_k": "int6-g16-signed-k8",
    "q2_0": "int2-g64-signed-f16",
    "q4_0": "int4-g32-signed-f16",
    "q4_1": "int4-g32-min-f16",
    "q5_0": "int5-g32-signed-f16",
    "q5_1": "int5-g32-min-f16",
    "q8_0": "int8-g32-sym-f16",
    "iq4_nl": "iq4nl-g32-signed-f16",
    "iq4_xs": "iq4nl-g32-signed-k6",
    "iq1_s": "iq1_s-g32-sym-k6",
    "iq1_m": "iq1_m-g16-sym-k6",
    "iq2_xxs": "iq2_xxs-g32-sym-k6",
    "iq2_xs": "iq2_xs-g16-sym-k6",
    "iq2_s": "iq2_s-g16-sym-k6",
    "iq3_xxs": "iq3_xxs-g32-sym-k6",
    "iq3_s": "iq3_s-g32-sym-k6",
}


@dataclass(frozen=True)
class Scheme:
    """A number format.

    grid   name in `GRIDS`
    group  16, 32, 64, 128 or 256 neighbours along K share a scale; "channel": a whole row; "tensor": all;
           "token": a whole row of activations [T, K], taken as it comes (dynamic)
    zero   "sym": w = s·v(c). "signed": the same, and s may be negative, which gives the grid's longer side to
           either sign. "asym": w = s·(c − z), z an integer in the code range. "asym1": the same with z above
           the lowest code, which is what GPTQ's v1 files can hold. "min": w = s·c + m, c unsigned, m ≤ 0 a float
    scale  how the scales (and mins) are stored: a key of `SCALE_BITS`

    Raises SchemeError for a combination that means nothing.
    """

    grid: str
    group: int | str
    zero: Zero = "sym"
    scale: str = "f16"

    def __post_init__(self) -> None:
        _one_of("grid", self.grid, GRIDS)
        _one_of("zero", self.zero, ZEROS)
        _one_of("scale encoding", self.scale, SCALE_BITS)
        if self.group not in (*GROUPS, CHANNEL, TENSOR, TOKEN):
            raise SchemeError(
                f"unknown group {self.group!r}",
                remedy=f"one of g{', g'.join(map(str, GROUPS))}, channel, tensor, token",
            )
        if not self.symmetric and not self.grid.startswith("int"):
            raise SchemeError(
                f"grid {self.grid} has no zero point: its levels are fixed", remedy="leave out the zero part"
            )
        blocked = self.scale in ("k8", "k6", "k4")
        if blocked and not isinstance(self.group, int):
            raise SchemeError(
                f"scale encoding {self.scale} needs groups inside blocks of {SUPERBLOCK}", remedy="use g16 or g32"
            )
        if self.scale == "k4" and self.levels.odd:
            message = f"{self.grid} has odd multiples up to {self.levels.odd} as scales, too many for k4"
            raise SchemeError(message, remedy="use k6")
        if self.zero == "signed" and (not self.levels.lopsided or self.scale in ("e8m0", "e4m3", "dq8")):
            message = f"{self.grid} with scales in {self.scale} has no use for negative ones"
            raise SchemeError(message, remedy="leave out 'signed'")
        if self.zero == "min" and self.scale not in ("f32", "f16", "bf16", "k6", "k4"):
            raise SchemeError(f"scale encoding {self.scale} cannot hold a float minimum", remedy="use f16, k6 or k4")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scheme that a text names; SchemeError lists what could have been meant."""
        parts = PRESETS.get(text.lower(), text.lower()).split("-")
        if len(parts) < 2:
            known = ", ".join(dict.fromkeys([*GRIDS, *PRESETS]))
            remedy = f"{_nearest(text)}GRID-GROUP[-ZERO][-SCALE] such as int4-g128; known: {known}"
            raise SchemeError(f"unknown scheme {text!r}", remedy=remedy)
        grid, group, *rest = parts
        zero = rest.pop(0) if rest and rest[0] in ZEROS else "sym"
        scale = rest.pop(0).replace("dq", "dq8").replace("dq88", "dq8") if rest else _default_scale(grid, group)
        if rest:
            raise SchemeError(
                f"scheme {text!r} has parts left over: {'-'.join(rest)}", remedy="GRID-GROUP[-ZERO][-SCALE]"
            )
        number = group[1:] if group.startswith("g") else ""
        try:
            return cls(grid, int(number) if number.isdecimal() else group, zero, scale)  # type: ignore[arg-type]
        except SchemeError as error:
            error.where = f"scheme {text!r}"
            error.remedy = _nearest(text) + error.remedy
            raise

    def __str__(self) -> str:
        group = f"g{self.group}" if isinstance(self.group, int) else self.group
        full = f"{self.grid}-{group}-{self.zero}-{self.scale}"
        for name, text in PRESETS.items():
            if text == full and name != "q8_0":  # which is plain int8-g32
                return name
        zero = "" if self.zero == "sym" else f"-{self.zero}"
        default = _default_scale(self.grid, group)
        return f"{self.grid}-{group}{zero}" + ("" if self.scale == default else f"-{self.scale}".replace("dq8", "dq"))

    @property
    def levels(self) -> Grid:
        """The grid's row of the table."""
        return GRIDS[self.grid]

    @property
    def symmetric(self) -> bool:
        """Whether w = s·v(c), with no offset."""
        return self.zero in ("sym", "signed")

    @property
    def reach(self) -> float | None:
        """The value that the largest |w| of a group is mapped to: the grid's own reach, or, where scales may be negative, its
        outermost level, as in llama.cpp."""
        grid = self.levels
        if self.zero != "signed" or grid.reach is None:
            return grid.reach
        return float(max(abs(level) for level in grid.levels or (grid.lo, grid.hi)))

    @property
    def holds_zero(self) -> bool:
        """Whether some code stands for exactly 0 under any scale: false with a float minimum, or on a grid without 0."""
        levels = self.levels.levels
        return self.zero != "min" and (levels is None or 0.0 in levels)

    @property
    def rowwise(self) -> bool:
        """Whether each output row is quantized independently of all others, so that matrices may be stacked."""
        return self.group != TENSOR and self.scale not in ("e4m3", "dq8")

    @property
    def unit(self) -> int | None:
        """Columns whose scales must be chosen together; None: all of them."""
        if not isinstance(self.group, int) or self.scale == "dq8":
            return None
        return SUPERBLOCK if self.scale in ("k8", "k6", "k4") else self.group

    def groups(self, K: int) -> int:
        """G, the number of groups in a row of K weights; the last may be short."""
        return math.ceil(K / self.group) if isinstance(self.group, int) else 1

    def group_length(self, K: int) -> int:
        """g, the weights of one row that share a scale."""
        return self.group if isinstance(self.group, int) else K

    def bits_per_weight(self, K: int) -> float:
        """Stored bits per weight of a matrix with rows of K weights, scales and zeros included, without a file's padding.

        Grids with a codebook (IQ1 to IQ3) count a code for each weight; their blocks in a GGUF file take fewer bits.
        """
        each = SCALE_BITS[self.scale]
        blocks = math.ceil(K / SUPERBLOCK)
        super_bits = 16 * blocks if self.scale in ("k8", "k6", "k4") else 0
        scale_bits = self.groups(K) * (each + (32 / SUPERBLOCK if self.scale == "dq8" else 0)) + super_bits
        if self.group == TENSOR:
            scale_bits = 0
        integers = 0.0 if self.group == TENSOR else float(self.groups(K) * self.levels.bits)
        zero_bits = {"sym": 0.0, "signed": 0.0, "min": scale_bits}.get(self.zero, integers)
        return self.levels.bits + (scale_bits + zero_bits) / K

    def with_scale(self, scale: str) -> Self:
        """The same scheme with another encoding of its scales."""
        return replace(self, scale=scale)


def _nearest(text: str) -> str:
    """The beginning of a remedy for a misspelt scheme: the common one of nearest text; "" if none is near."""
    groups = [*(f"g{g}" for g in GROUPS), CHANNEL, TENSOR]
    usual = [f"{grid}-{group}{zero}" for grid in GRIDS for group in groups for zero in ("", "-asym")]
    near = get_close_matches(text.lower(), [*PRESETS, *usual], 1)
    return f"did you mean {near[0]}? " if near else ""


def _default_scale(grid: str, group: str) -> str:
    """The encoding of scales where a scheme's text does not name one."""
    return DEFAULT_SCALE.get(group, DEFAULT_SCALE.get(grid, "f16"))


def _one_of(
    kind: str, value: str, known: dict[str, object] | dict[str, Grid] | dict[str, int] | tuple[str, ...]
) -> None:
    if value not in known:
        raise SchemeError(f"unknown {kind} {value!r}", remedy=f"one of {', '.join(known)}")
