"""Work shared out among threads, in each of which torch computes on one core.

Torch shares out every operation by itself, and waits for the slower thread after each; where many pieces of work know
nothing of each other it is faster to give each thread its own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def single_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, in each of which torch computes with that one thread."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # the number is a thread's own, but new threads begin with the one set last


def each(f: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[f(item) for item in items], side by side on as many threads as torch may use here."""
    known, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(known) < 2:
        return [f(item) for item in known]
    with single_threads(threads) as pool:
        return list(pool.map(f, known))


@contextmanager
def ahead(f: Callable[[T], R], items: Iterable[T]) -> Iterator[Iterator[R]]:
    """What `each` makes of them, one after the other, while the next are computed. When it is left, nothing more is begun."""
    with single_threads(torch.get_num_threads()) as pool:
        begun = deque(pool.submit(f, item) for item in items)  # a result that was taken is not kept
        try:
            yield (begun.popleft().result() for _ in range(len(begun)))
        finally:
            for one in begun:
                one.cancel()
