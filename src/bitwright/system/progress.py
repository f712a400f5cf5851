"""Progress of a long job: a function that is told how far it is."""

from collections.abc import Callable

# Told what kind of step was done last (behind a comma what came of it), how many steps are done, and of how many.
Progress = Callable[[str, int, int], None]
