"""The allocations that bench.allocations draws: of the same bytes, near one another where they are mutated, and searched."""

from random import Random

import pytest
from bench.allocations import FILLED, Levels, Space, evolved

from bitwright.plan.units import Choice

SIZES = (1000, 1500, 2000, 4000)


@pytest.fixture
def space() -> Space:
    choices = [[Choice(f"s{at}", (), size) for at, size in enumerate(SIZES)] for _ in range(40)]
    return Space([[f"m{i}"] for i in range(40)], choices, 70_000)


def test_allocations_keep_the_budget_and_fill_it(space: Space) -> None:
    drawn = [space.random(Random(seed)) for seed in range(50)]
    children = [space.mutated(levels, Random(1)) for levels in drawn]
    for levels in (*drawn, *children):
        assert FILLED * space.budget <= space.bytes(levels) <= space.budget
        assert space.levels(space.schemes(levels)) == levels
    assert len({tuple(levels) for levels in drawn}) == 50
    changed = [sum(a != b for a, b in zip(one, other, strict=True)) for one, other in zip(drawn, children, strict=True)]
    assert 0 < sum(changed) / len(changed) < 10


def test_a_search_comes_nearer_to_the_best(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the units cost ten times as much. A generation takes a second, by this clock."""
    monkeypatch.setattr("bench.allocations.time.process_time", iter(range(1000)).__next__)

    class Predicted:
        ids = range(16)

        def kl(self, schemes: dict[str, str], windows: object = None) -> list[float]:
            return [sum(cost(i, int(schemes[f"m{i}"][1:])) for i in range(40))]

    def cost(unit: int, level: int) -> float:
        return (10 if unit % 2 else 1) * 4.0**-level

    def whole(levels: Levels) -> float:
        return sum(cost(i, level) for i, level in enumerate(levels))

    start = space.random(Random(3))
    found, generations = evolved(space, Predicted(), start, 100, Random(0))  # type: ignore[arg-type]
    assert generations == 99
    assert whole(found) < 0.8 * whole(start)
