"""Every error that bitwright raises on purpose.

BitwrightError
├── InputError            the user can mend it; the command line exits with 2 and has written nothing
│   ├── SchemeError       a number format that does not exist, or does not fit a shape
│   ├── CheckpointError   a source that is missing, damaged, not finite or already quantized
│   ├── RecipeError       an unknown method, key or option; a pattern that matches nothing
│   ├── CalibrationError  text that is missing, empty or too short
│   ├── FormatError       a file format that cannot hold what was asked
│   ├── KernelError       an instruction set was asked for that this CPU or this build lacks
│   └── OutputError       OUT exists, the disk is full, unfinished work of another kind lies there
├── NumericsError         a matrix that cannot be factored, a value that is not finite
└── VerificationError     what was written is not what was meant; the command line exits with 1
"""

from collections.abc import Iterable
from difflib import get_close_matches


def one_of(word: str, known: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest known one, if any is near, and all of them."""
    names = list(known)
    near = get_close_matches(word.lower(), names, 1)
    return f"did you mean {near[0]}? One of {', '.join(names)}" if near else f"one of {', '.join(names)}"


class BitwrightError(Exception):
    """An error: what was found and expected (message), in which tensor or file (where), what to do about it (remedy)."""

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.remedy = message, where, remedy

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        remedy = f"\n  remedy: {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{remedy}"

    def as_dict(self) -> dict[str, str]:
        """The JSON form: {error, where, remedy}."""
        return {"error": self.message, "where": self.where, "remedy": self.remedy}


class InputError(BitwrightError):
    """Bad input or usage."""


class SchemeError(InputError):
    """A number format that does not exist, or does not fit a shape."""


class CheckpointError(InputError):
    """A source that is missing, damaged, not finite or already quantized."""


class RecipeError(InputError):
    """An unknown method, key or option, or a pattern that matches nothing."""


class CalibrationError(InputError):
    """Text that is missing, empty or too short."""


class FormatError(InputError):
    """A file format that cannot hold what was asked."""


class KernelError(InputError):
    """An instruction set was asked for that this CPU or this build lacks."""


class OutputError(InputError):
    """OUT exists or cannot be written, the disk is full, or other unfinished work lies beside it."""


class NumericsError(BitwrightError):
    """A matrix that cannot be factored, or a value that is not finite."""


class VerificationError(BitwrightError):
    """What was written is not what was meant."""
