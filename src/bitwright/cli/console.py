"""What all commands do at the terminal: errors as messages or JSON, progress, results as a list or JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
console, errors = Console(), Console(stderr=True)


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Errors of ours become a message (or JSON) and an exit status; any other is a bug and keeps its traceback."""
    from bitwright.errors import BitwrightError, InputError

    try:
        yield
    except BitwrightError as error:
        if as_json:
            print(json.dumps(error.as_dict()))
        else:
            errors.print(f"[bold red]error[/] {plain(error.where + ': ' if error.where else '')}{plain(error.message)}")
            if error.remedy:
                errors.print(f"[bold]remedy[/] {plain(error.remedy)}")
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None


def plain(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A callback that draws a bar on stderr, or does nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, disable=quiet, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update


def show(content: dict[str, Any], as_json: bool, title: str) -> None:
    """A result as JSON, or as a short list."""
    if as_json:
        print(json.dumps(content))
        return
    console.print(f"[bold]{plain(title)}[/]")
    width = max(18, *map(len, content))
    for key, value in content.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
        if value not in (None, [], ()):
            console.print(f"  {key:<{width}} {plain(shown)}", highlight=False)
