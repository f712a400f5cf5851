"""Allocate bytes: which scheme each matrix gets, so that the predicted loss is least and the bytes are at most a budget.

A multiple-choice knapsack: one option of each unit, costs and values add up. Solved by dynamic programming over a grid of
budgets, whose table answers every budget and every loss at once; what rounding to the grid leaves over is then spent option by
option, in exact bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
ROUNDS = 8  # of correcting a budget by what the other bytes turn out to be
CELLS = 20_000  # budgets of the grid: what rounding up leaves over is spent afterwards


@dataclass(frozen=True)
class Option:
    """What a unit may be given: its scheme by name, bytes in the file, and the loss that it is predicted to add.

    loss: for a language model KL in nats a token, for another module the relative error of its outputs
    """

    scheme: str
    bytes: int
    loss: float


class Allocation:
    """The table of the dynamic programme for units with one or more options each."""

    def __init__(self, units: Sequence[Sequence[Option]]) -> None:
        self.units = [sorted(unit, key=lambda option: option.bytes) for unit in units]
        self.least = sum(unit[0].bytes for unit in self.units)
        self.most = sum(unit[-1].bytes for unit in self.units)
        self.cell = max(1, -(-(self.most - self.least) // CELLS))
        self._best, self._taken = self._table()

    def _table(self) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]]]:
        """The least loss for each budget above `least`, in cells; and, unit by unit, the option that was taken to reach it."""
        width = 1 + sum(
            self._cells(unit[-1], unit) for unit in self.units
        )  # up to the largest of each, rounded up one by one
        best, taken = np.zeros(width), []
        for unit in self.units:
            found, choice = np.full(width, np.inf), np.zeros(width, np.uint8)
            for at, option in enumerate(unit):
                cells = self._cells(option, unit)
                tried = best[: width - cells] + option.loss
                better = tried < found[cells:]
                found[cells:][better] = tried[better]
                choice[cells:][better] = at
            best = found
            taken.append(choice)
        return best, taken

    def _cells(self, option: Option, unit: Sequence[Option]) -> int:
        """Bytes above the unit's smallest option, in cells, rounded up."""
        return -(-(option.bytes - unit[0].bytes) // self.cell)

    def within(self, budget: int) -> list[Option] | None:
        """The best option for each unit, of at most `budget` bytes together; None if even the smallest take more."""
        if budget < self.least:
            return None
        cell = min((budget - self.least) // self.cell, len(self._best) - 1)
        return self._spend(self._options(cell), budget)

    def carried_out(
        self, limit: int, other: int, carry_out: Callable[[list[Option]], tuple[T, int]]
    ) -> tuple[T, list[Option]] | None:
        """The best options whose result takes at most `limit` bytes, all counted; None if even the smallest take more.

        other: a guess at the result's bytes beside the options', which may depend on them. carry_out: gives a result, and its
        exact bytes
        """
        found: tuple[T, list[Option]] | None = None
        for _ in range(ROUNDS):
            options = self.within(limit - other)
            if options is None:
                break
            result, taken = carry_out(options)
            exact = taken - sum(option.bytes for option in options)
            if taken > limit:
                other = max(exact, other + 1)
                continue
            found = result, options
            if exact >= other:
                break
            other = exact
        return found

    def below(self, loss: float) -> list[Option] | None:
        """The fewest bytes whose predicted loss is at most `loss`; None if there are none."""
        reached = np.flatnonzero(np.minimum.accumulate(self._best) <= loss)
        return self._options(int(reached[0])) if len(reached) else None

    def _options(self, cell: int) -> list[Option]:
        found = []
        for unit, choice in zip(reversed(self.units), reversed(self._taken), strict=True):
            option = unit[choice[cell]]
            found.append(option)
            cell -= self._cells(option, unit)
        return found[::-1]

    def _spend(self, options: list[Option], budget: int) -> list[Option]:
        """Spend what is left over: again and again the step that saves most among those that fit."""
        found, left = list(options), budget - sum(option.bytes for option in options)
        while True:
            steps = [
                (option.loss - found[i].loss, i, option)
                for i, unit in enumerate(self.units)
                for option in unit
                if option.bytes - found[i].bytes <= left and option.loss < found[i].loss
            ]
            if not steps:
                return found
            _, i, option = min(steps, key=lambda step: step[:2])
            left -= option.bytes - found[i].bytes
            found[i] = option
