"""A text of the adapter's domain in two parts: most of it to calibrate on, the end to judge on."""

from pathlib import Path
from typing import Any

from bitwright.calibration.data_sets import documents, is_data_set
from bitwright.calibration.text_mix import BUILT_IN
from bitwright.calibration.windows import read_text
from bitwright.errors import CalibrationError
from bitwright.files.checkpoint import disk_errors
from bitwright.gguf.imatrix import is_imatrix

HELD_OUT = 0.1  # share of the text that is judged on


def check_has_parts(source: str) -> None:
    """CalibrationError for what is no file of text, of which a part could be held out."""
    if source in (*BUILT_IN, "none") or ("," in source and not Path(source).is_file()) or is_imatrix(source):
        remedy = "--calib FILE: text of what the adapter was trained on; or name what to judge on: --text FILE"
        raise CalibrationError("no part of this text can be held out to judge on", where=source, remedy=remedy)


def two_parts(source: str, tokenizer: Any, folder: Path) -> tuple[Path, Path]:
    """Write both parts of a text file into `folder`: for calibration, and held out.

    A data set's conversations are put into the model's chat template first. CalibrationError as of `check_has_parts`, or for
    a text that is too short; others as of `documents`.
    """
    check_has_parts(source)
    pieces = documents(tokenizer, source) if is_data_set(source) else read_text(source).splitlines(keepends=True)
    cut = _index_at((1 - HELD_OUT) * sum(map(len, pieces)), pieces)
    if not 0 < cut < len(pieces):
        raise CalibrationError("one line cannot be cut in two parts", where=source, remedy="more text, in lines")
    found = folder / "seen" / Path(source).name, folder / "held-out" / Path(source).name
    for file, part in zip(found, (pieces[:cut], pieces[cut:]), strict=True):
        with disk_errors(file):
            file.parent.mkdir(parents=True)
            file.with_suffix(".txt").write_text("".join(part), encoding="utf-8")
    return found[0].with_suffix(".txt"), found[1].with_suffix(".txt")


def _index_at(length: float, pieces: list[str]) -> int:
    """How many pieces come before this many characters."""
    total = 0
    for i, piece in enumerate(pieces):
        if total >= length:
            return i
        total += len(piece)
    return len(pieces) - 1
