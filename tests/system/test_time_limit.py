"""Code that never ends is stopped; what it gives and raises comes through otherwise."""

import threading
import time

import pytest

from bitwright.system.time_limit import within


def endless() -> None:
    while True:
        pass


def test_what_does_not_end_is_stopped() -> None:
    before = threading.active_count()
    with pytest.raises(TimeoutError):
        within(0.05, endless)
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.05)
    pytest.fail("its thread goes on")


def test_results_and_errors_come_through() -> None:
    assert within(10, lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)
