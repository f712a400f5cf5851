"""What all commands do at the terminal: errors as messages or JSON, progress, results as a list or JSON."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Requantize = Annotated[
    bool, typer.Option("--requantize", help="Take a source that is quantized already (GGUF too), decoded.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary: only what is worse than asked.")]
Out = Annotated[
    Path, typer.Argument(help="Directory or .gguf file to make; it appears only when complete and verified.")
]
Model = Annotated[
    Path,
    typer.Argument(
        help="Directory with a Hugging Face checkpoint (safetensors), a .gguf file, or a name on the hub: org/name, "
        "org/name@revision, org/name:FILE.gguf."
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        help="Calibration text: general (prose, dialogues, code; it comes with bitwright), stdlib (Python's own sources) or a "
        "UTF-8 file; a mix such as general:7,my.txt:3 by shares; none; or llama.cpp's imatrix file."
    ),
]
Samples = Annotated[int, typer.Option(min=1, metavar="<int>", help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(min=2, metavar="<int>", help="Tokens in a calibration window.")]
Seed = Annotated[int, typer.Option(help="Which windows of the text are taken.")]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Go on with unfinished work, or discard it.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Stop before the first weight: sizes, memory, and all refusals.")
]
Device = Annotated[str, typer.Option(help="Compute on cpu, cuda or cuda:N.")]
console, errors = Console(emoji=False), Console(stderr=True, emoji=False)  # general:-1:… is a share, no thumb
PAUSE = 5.0  # seconds in a log without a line, while steps have no result to tell
INTERRUPTED = 130  # exit status, as shells have it


class Interruption:
    """Remembers Ctrl-C: Python drops a KeyboardInterrupt that is raised while an object is being finalized."""

    seen = False

    def listen(self) -> None:
        """Remember SIGINT from now on, as well as raise KeyboardInterrupt."""
        if (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # unless SIGINT is ignored, as in background jobs
            signal.signal(signal.SIGINT, self._raise)
            sys.unraisablehook = _unless_interrupted

    def _raise(self, *_: object) -> None:
        self.seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """KeyboardInterrupt if there was one; called between steps of long work."""
        if self.seen:
            raise KeyboardInterrupt


def _unless_interrupted(dropped: "sys.UnraisableHookArgs") -> None:
    """Report an exception that Python drops, unless it is Ctrl-C, which `Interruption` remembers."""
    if dropped.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(dropped)


interruption = Interruption()


@contextmanager
def reporting(as_json: bool, kept: str = "nothing was written", *, quiet: bool = False) -> Iterator[None]:
    """Turn a BitwrightError into a message (or JSON) and an exit status; any other error is a bug and keeps its traceback.

    kept: what to say after Ctrl-C of work that is kept, and how to resume it; quiet: no progress bars of downloads.
    """
    from bitwright.errors import BitwrightError, InputError

    if as_json or quiet:  # read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except KeyboardInterrupt:
        if as_json:
            print(json.dumps({"error": "interrupted", "where": "", "remedy": kept}))
        else:
            say(f"interrupted: {plain(kept)}", errors)
        raise typer.Exit(INTERRUPTED) from None
    except BitwrightError as error:
        if as_json and speaks():
            print(json.dumps(error.as_dict()))
        else:
            where = f"{error.where}: " if error.where else ""
            say(f"[bold red]error[/] {plain(where + error.message)}", errors)
            if error.remedy:
                say(f"[bold]remedy[/] {plain(error.remedy)}", errors)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def speaks() -> bool:
    """Whether this process prints for all: it is the only one, or the first."""
    return not launched() or os.environ["RANK"] == "0"


def check_model(*models: Path | None) -> None:
    """Refuse what is no model, and download what is named as on the hub, before anything large is imported."""
    from bitwright.files.hub import local
    from bitwright.files.model_path import check_model_path

    for model in models:
        if model is not None:
            check_model_path(local(model))


def plain(text: str) -> str:
    """Text without markup: its brackets print as they are."""
    return escape(text)


def say(line: str, to: Console = console) -> None:
    """Print a line of rich's markup: wrapped at a terminal's width; whole in a file, and with a command to be pasted."""
    to.print(line, highlight=False, soft_wrap="bitwright " in line or not to.is_terminal)


def announce(headline: str, *, quiet: bool) -> None:
    """Say what a command is about to do."""
    if not quiet:
        say(plain(headline), errors)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A progress callback: a bar on stderr, if that is a terminal; else a line a step; nothing if quiet."""
    with _bar() if errors.is_terminal and not quiet else nullcontext(_log(quiet)) as update:

        def step(what: str, done: int, total: int) -> None:
            interruption.check()
            update(what, done, total)

        yield step


def _log(quiet: bool) -> Callable[[str, int, int], None]:
    return (lambda *_: None) if quiet else log_lines(lambda line: print(line, file=sys.stderr, flush=True))


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def log_lines(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """A progress callback that prints lines: which step of how many, the seconds since the last line, a result, the time left.

    A line for each step that has a result; of others, for the last of all and every `PAUSE` seconds.
    """
    begun: list[tuple[float, int]] = []  # (time, step): where counting started; where the last line was said

    def update(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        kind, _, outcome = what.partition(", ")
        if not begun or done <= begun[0][1]:  # the first call of a run, or of its next kind of step
            begun[:] = [(now, done), (now, done)]
            return
        if not outcome and done < total and now - begun[1][0] < PAUSE:
            return
        each = (now - begun[0][0]) / (done - begun[0][1])
        parts = [f"{kind} {done} of {total}", f"{now - begun[1][0]:.1f} s", outcome]
        parts += [f"{duration(each * (total - done))} left"] if done < total else []
        begun[1] = (now, done)
        say(", ".join(part for part in parts if part))

    return update


def duration(seconds: float) -> str:
    """A duration to about two figures: 42 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """A number of bytes: 94.2 MB, 1.31 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def show(content: dict[str, Any], as_json: bool, title: str) -> None:
    """A result as JSON, or as a short list."""
    if as_json:
        print(json.dumps(content))
        return
    console.print(f"[bold]{plain(title)}[/]")
    width = max(18, *map(len, content))
    for key, value in content.items():
        for at, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if part is not None:
                say(f"  {'' if at else key:<{width}} {plain(_shown(part))}")


def _shown(value: object) -> str:
    """A value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
