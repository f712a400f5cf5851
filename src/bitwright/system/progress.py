"""Progress of a long job: a function that is told how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # kind of step, done, total
