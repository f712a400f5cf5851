"""The argument of `--calib`: one text, or several with shares, as in general:0.7,code.txt:0.3."""

import codecs
import os
from dataclasses import dataclass
from math import inf

from bitwright.errors import CalibrationError
from bitwright.gguf.imatrix import is_imatrix

BUILT_IN = ("general", "stdlib", "stdlib-heldout")  # names of texts that come with the package or with Python
EXAMPLE = "as in general:0.7,code.txt:0.3"
GLANCE = 1 << 16  # bytes of a file that are looked at before any work


@dataclass(frozen=True)
class Text:
    """A built-in text or a file, and its share of the windows."""

    name: str
    share: float


def texts_of(calib: str) -> tuple[Text, ...]:
    """The texts of a mix, with shares that sum to 1; equal shares where none are given.

    An existing file may have commas and colons in its name. CalibrationError for a share that is not a positive number, or
    that only some texts have; for an empty name or one given twice; for an importance matrix in a mix.
    """
    parts = [_part(entry, calib) for entry in _entries(calib)]
    names, shares = [name for name, _ in parts], [share for _, share in parts]
    if "" in names:
        raise CalibrationError(
            "a text without a name", where=calib, remedy=f"put one comma between two texts, {EXAMPLE}"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CalibrationError(
            f"{twice!r} is named twice", where=calib, remedy="name it once, with the sum of the shares"
        )
    if len(parts) > 1 or shares[0] is not None:
        _check_mix(names, calib)
    given = [share for share in shares if share is not None]
    if given and len(given) < len(parts):
        message = "some texts have a share, others have not"
        raise CalibrationError(message, where=calib, remedy=f"give every text a share, {EXAMPLE}, or none")
    total = sum(given) if given else len(parts)
    return tuple(Text(name, (1 if share is None else share) / total) for name, share in parts)


def check_texts(calib: str) -> None:
    """CalibrationError for a mix as of `texts_of`, or for a file that is missing, or begins unlike UTF-8 text."""
    for text in texts_of(calib):
        if text.name not in (*BUILT_IN, "none") and not is_imatrix(text.name):
            try:
                with open(text.name, "rb") as file:
                    begin = file.read(GLANCE)
                    codecs.getincrementaldecoder("utf-8")().decode(begin, final=len(begin) < GLANCE)
            except (OSError, UnicodeDecodeError) as error:
                raise unreadable(text.name, error) from error


def unreadable(source: str, error: OSError | UnicodeDecodeError) -> CalibrationError:
    """The error for a file that cannot be opened, or is no text."""
    if isinstance(error, UnicodeDecodeError):
        return CalibrationError("not UTF-8 text", where=source, remedy="convert it to UTF-8")
    remedy = f"give a UTF-8 text file, or one of {', '.join(BUILT_IN)}"
    return CalibrationError(f"cannot read the text: {error.strerror}", where=source, remedy=remedy)


def windows_of(texts: tuple[Text, ...], samples: int, calib: str) -> list[int]:
    """How many of `samples` windows each text gives: whole numbers nearest to the shares, that sum to `samples`.

    CalibrationError where a text would give none.
    """
    wanted = [text.share * samples for text in texts]
    counts = [int(count) for count in wanted]
    behind = sorted(range(len(texts)), key=lambda i: counts[i] - wanted[i])
    for i in behind[: samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        message = (
            f"{samples} windows are too few for shares like these: {texts[counts.index(0)].name!r} would give none"
        )
        raise CalibrationError(message, where=calib, remedy="raise --samples, or that text's share")
    return counts


def _entries(calib: str) -> list[str]:
    """The parts between commas; commas in an existing file's name do not count."""
    pieces, entries = calib.split(","), []
    while pieces:
        joined = (",".join(pieces[:n]) for n in range(len(pieces), 1, -1))
        entry = next((e for e in joined if os.path.isfile(e) or os.path.isfile(e.rpartition(":")[0])), pieces[0])
        entries.append(entry)
        pieces = pieces[entry.count(",") + 1 :]
    return entries


def _part(entry: str, calib: str) -> tuple[str, float | None]:
    """A text's name, and its share if one is given."""
    name, colon, share = entry.rpartition(":")
    if not colon or os.path.isfile(entry):
        return entry, None
    number = _number(share)
    if number is None and name not in BUILT_IN and not os.path.isfile(name):
        return entry, None  # a missing file with a colon in its name
    if number is None or not 0 < number < inf:
        message = f"the share {share!r} of {name!r} is not a positive number"
        raise CalibrationError(message, where=calib, remedy=f"write it {EXAMPLE}")
    return name, number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_mix(names: list[str], calib: str) -> None:
    """CalibrationError for an importance matrix in a mix: it has no windows to take a share of."""
    for name in names:
        if name == "none" or is_imatrix(name):
            what = "none" if name == "none" else f"the importance matrix {name!r}"
            message = f"{what} is no text, and cannot be mixed with any"
            raise CalibrationError(message, where=calib, remedy="give it alone, or texts only")
