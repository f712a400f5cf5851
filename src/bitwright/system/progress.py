"""How far a long job is, told to whoever waits for it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # kind of step, done, total
