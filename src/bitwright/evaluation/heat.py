"""Tables of the page's heat maps: blocks down, kinds of matrices across; losses, and what mixes and recipes gave."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.evaluation.candidate import Candidate

# outside all blocks?, name of the list of blocks, number of the block, kind of matrix
Place = tuple[bool, str, int, str]


def _place(module: str) -> Place:
    """model.layers.3.mlp.down_proj -> block 3 of model.layers, kind mlp.down_proj. Experts' numbers become a star."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 10]
    if not numbers:
        return True, "", 0, module
    at = numbers[0]
    kind = ["*" if i in numbers else part for i, part in enumerate(parts)][at + 1 :]
    return False, ".".join(parts[:at]), int(parts[at]), ".".join(kind)


@dataclass(frozen=True)
class _Grid:
    """Rows (blocks), columns (kinds), and the place of each module in a flat list of cells."""

    rows: list[list[Any]]
    columns: list[str]
    at: dict[str, int]

    @classmethod
    def of(cls, modules: Iterable[str]) -> "_Grid":
        places = {module: _place(module) for module in modules}
        rows = {row: r for r, row in enumerate(sorted({place[:3] for place in places.values()}))}
        columns = {kind: k for k, kind in enumerate(dict.fromkeys(place[3] for place in places.values()))}
        at = {module: rows[place[:3]] * len(columns) + columns[place[3]] for module, place in places.items()}
        named = [["" if outside else f"{name}.{number}".strip("."), number] for outside, name, number in rows]
        return cls(named, list(columns), at)

    def together(self, modules: Mapping[str, Any]) -> dict[int, list[str]]:
        """The modules of each cell."""
        found: dict[int, list[str]] = defaultdict(list)
        for module in modules:
            found[self.at[module]].append(module)
        return found

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.columns)


def heat(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Losses: rows, columns, and one flat list of cells for each candidate.

    A cell is None, a loss, or [mean, count, worst, its module] where a block has several of a kind, such as experts.
    """
    grid = _Grid.of(dict.fromkeys(module for c in candidates for module in c.losses))
    tables = [[None] * grid.size for _ in candidates]
    for table, c in zip(tables, candidates, strict=True):
        for at, modules in grid.together(c.losses).items():
            table[at] = _cell([(float(f"{c.losses[module]:.4g}"), module) for module in modules])
    return {"rows": grid.rows, "columns": grid.columns, "cells": tables, "schemes": [c.scheme for c in candidates]}


def _cell(here: list[tuple[float, str]]) -> Any:
    """A cell of the heat map; non-finite losses become None, since JSON has no NaN."""
    mean = sum(loss for loss, _ in here) / len(here)
    known = mean if math.isfinite(mean) else None
    return known if len(here) == 1 or known is None else [mean, len(here), *max(here)]


def given(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """What candidates with more than one scheme gave each matrix: rows, columns, and cells by the candidate's index.

    A cell is None or [bits a weight, scheme]; of several matrices of a kind the mean, and each scheme with its number.
    """
    mixed = {i: c for i, c in enumerate(candidates) if len({scheme for scheme, _ in c.given.values()}) > 1}
    grid = _Grid.of(dict.fromkeys(module for c in mixed.values() for module in c.given))
    tables: dict[int, list[Any]] = {i: [None] * grid.size for i in mixed}
    for i, c in mixed.items():
        for at, modules in grid.together(c.given).items():
            bits = sum(c.given[module][1] for module in modules) / len(modules)
            schemes = Counter(c.given[module][0] for module in modules)
            named = [scheme if len(modules) == 1 else f"{n} × {scheme}" for scheme, n in schemes.most_common()]
            tables[i][at] = [round(bits, 2), ", ".join(named)]
    return {"rows": grid.rows, "columns": grid.columns, "cells": tables}
