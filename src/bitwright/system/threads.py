"""Independent pieces of work on several threads, with torch on one core in each.

Torch splits every single operation over its threads and waits for the slowest after each; where pieces of work are
independent, it is faster to give each thread a piece of its own.
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
    """A pool of threads, in each of which torch computes on one core."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # each thread has its own number, but new threads inherit the one set last


def each(f: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[f(item) for item in items], side by side on as many threads as torch may use here."""
    known, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(known) < 2:
        return [f(item) for item in known]
    with single_threads(threads) as pool:
        return list(pool.map(f, known))


@contextmanager
def ahead(f: Callable[[T], R], items: Iterable[T]) -> Iterator[Iterator[R]]:
    """An iterator over [f(item) for item in items], computed ahead on other threads; leaving cancels what has not begun."""
    with single_threads(torch.get_num_threads()) as pool:
        begun = deque(pool.submit(f, item) for item in items)  # popped as they are taken: no result is kept longer
        try:
            yield (begun.popleft().result() for _ in range(len(begun)))
        finally:
            for one in begun:
                one.cancel()
