"""Progress of a long job: a function that is told how far it is."""

from collections.abc import Callable

# progress(step, done, total): the kind of step that was just done (after a comma: its result), steps done, steps in all.
Progress = Callable[[str, int, int], None]


def named(progress: Progress, whose: str) -> Progress:
    """The same, with this before the kind of step."""
    return lambda step, done, total: progress(f"{whose}{step}", done, total)
