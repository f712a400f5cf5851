"""Spending bytes: never above the budget, and never above what trying every allocation finds."""

from itertools import product

import numpy as np
import pytest

from bitwright.errors import RecipeError
from bitwright.plan.allocation import Allocation, Option
from bitwright.plan.target import Target, bytes_of


def units(count: int, seed: int) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        size, slope = int(rng.integers(900, 5000)), rng.lognormal(0, 1.5)
        found.append([Option(str(b), size * b, float(slope * 4.0**-b * rng.uniform(0.8, 1.2))) for b in (2, 3, 4, 6)])
    return found


@pytest.mark.parametrize("seed", range(4))
def test_no_allocation_of_as_many_bytes_is_better(seed: int) -> None:
    some = units(6, seed)
    allocation = Allocation(some)
    every = [(sum(o.bytes for o in one), sum(o.loss for o in one)) for one in product(*some)]
    for share in (0.0, 0.1, 0.37, 0.8, 1.0):
        budget = allocation.least + int(share * (allocation.most - allocation.least))
        best = min(kl for size, kl in every if size <= budget)
        found = allocation.within(budget)
        assert found is not None
        assert sum(o.bytes for o in found) <= budget
        assert sum(o.loss for o in found) == pytest.approx(best, rel=1e-9)
        fewest = min(size for size, kl in every if kl <= best)
        cheap = allocation.below(best)
        assert cheap is not None
        assert sum(o.loss for o in cheap) <= best
        assert sum(o.bytes for o in cheap) <= fewest * 1.005
    assert allocation.within(allocation.least - 1) is None
    assert allocation.below(0.0) is None


def test_what_the_grid_leaves_over_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.plan.allocation.CELLS", 20)
    allocation = Allocation(units(60, 0))
    budget = (allocation.least + allocation.most) // 2
    found = allocation.within(budget)
    assert found is not None
    assert 0.995 * budget < sum(o.bytes for o in found) <= budget


def test_the_smallest_loss_of_all_is_reached() -> None:
    """Sizes are rounded up to cells one by one: with many units, together by many cells."""
    many = units(60, 7)
    allocation = Allocation(many)
    least = sum(unit[-1].loss for unit in many)
    found = allocation.below(least * (1 + 1e-9))
    assert found == [unit[-1] for unit in many]
    assert allocation.below(least * 0.999) is None


def test_targets() -> None:
    assert (bytes_of("100MB"), bytes_of("1.5 GiB"), bytes_of("300")) == (100_000_000, 3 << 29, 300)
    for size, bits, kl in (
        (None, None, None),
        ("1GB", 4.0, None),
        (None, 4.0, 0.1),
        (None, -1.0, None),
        ("0MB", None, None),
    ):
        with pytest.raises(RecipeError):
            Target.parse(size, bits, kl)
    with pytest.raises(RecipeError, match="not a size"):
        bytes_of("100 apples")
