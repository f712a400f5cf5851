"""What a plan may spend: bits a weight, bytes of the files, or KL."""

import re
from dataclasses import dataclass
from fractions import Fraction

from bitwright.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One of three. RecipeError for none, several, or one that is not above zero.

    size     bytes of the weight files together, or of the GGUF file
    bits     8 × bytes of all weight data / parameters, as `bitwright quantize` reports it
    kl       nats a token, predicted
    by_plan  whether `plan` was given it, which has --kl and --schemes; `quantize` has neither, and its refusals name neither
    """

    size: int | None = None
    bits: float | None = None
    kl: float | None = None
    by_plan: bool = True

    def __post_init__(self) -> None:
        targets = {"size": self.size, "bits": self.bits, "kl": self.kl}
        given = {name: value for name, value in targets.items() if value is not None}
        options, last = ("--bits 4.25, --size 100MB", "--kl 0.05") if self.by_plan else ("--bits 4.25", "--size 100MB")
        if len(given) != 1:
            named = " and ".join(f"--{name}" for name in given) or "none"
            raise RecipeError(f"one target is needed, not {named}", remedy=f"give one of {options} and {last}")
        ((name, value),) = given.items()
        if not 0 < value < float("inf"):
            message = f"{value} is no target: it must be above 0, and finite"
            raise RecipeError(message, where=f"--{name}", remedy=f"{options} or {last}")

    @classmethod
    def parse(cls, size: str | None, bits: float | None, kl: float | None = None, *, by_plan: bool = True) -> "Target":
        """From the command line's options."""
        return cls(None if size is None else bytes_of(size), bits, kl, by_plan)

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.size:,} bytes"
        return f"{self.bits:g} bits a weight" if self.bits is not None else f"a KL of {self.kl:g}"


def bytes_of(text: str, where: str = "--size") -> int:
    """A size such as 100MB (10⁶ bytes each) or 6GiB (2³⁰). RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise RecipeError(f"{text!r} is not a size", where=where, remedy="such as 100MB, or 6GiB")
    return int(Fraction(found[1]) * UNITS[found[2].upper()])
