"""A time limit for Python code of somebody else's that may never end, such as the loops of a template."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, job: Callable[[], T]) -> T:
    """job(), and what it raises; TimeoutError if it takes longer.

    It runs on a thread of its own, which is then stopped at its next step in Python.
    """
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(get_ident).result()
        begun = pool.submit(job)
        try:
            return begun.result(seconds)
        finally:
            if not begun.done():  # late, or the user has interrupted
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))
