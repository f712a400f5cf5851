"""What a model's allocations take on the disk, known before any weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import RecipeError
from bitwright.files.checkpoint import spec_bytes
from bitwright.plan.run_plan import Plan
from bitwright.plan.target import Target
from bitwright.plan.units import Unit

TOLERANCE = 0.005  # share by which a target may be above the largest allocation, and still get it


@dataclass(frozen=True)
class Sizes:
    """What a model's allocations take on the disk, known before any weight is read.

    least, most  bytes of the units in their smallest and in their largest choices
    other        bytes of all else in the files: kept tensors, headers, keys; data: of that without headers and keys
    """

    model: Path
    parameters: int
    units: int
    schemes: tuple[str, ...]
    least: int
    most: int
    other: int
    data: int

    @classmethod
    def of(cls, base: Plan, units: list[Unit]) -> "Sizes":
        """The sizes of a base plan and its units."""
        widest = sum(spec_bytes(base.specs([t])) for unit in units for t in unit.members)
        schemes = tuple(dict.fromkeys(choice.scheme for unit in units for choice in unit.choices))
        ends = [sum(pick(choice.bytes for choice in unit.choices) for unit in units) for pick in (min, max)]
        other, data = base.bytes - widest, data_bytes(base) - widest
        return cls(base.source, base.parameters, len(units), schemes, ends[0], ends[1], other, data)

    def limit(self, target: Target) -> tuple[int, int]:
        """The bytes that may be taken, and those of them that the units cannot have."""
        if target.size is not None:
            return target.size, self.other
        return int((target.bits or 0) * self.parameters / 8), self.data

    def bits_per_weight(self, units: int) -> float:
        """Bits a weight of a result whose units take so many bytes."""
        return 8 * (self.data + units) / self.parameters

    def headline(self, memory: int) -> str:
        """What is chosen from, in a line; memory: bytes that choosing takes."""
        ends = " to ".join(f"{(self.other + end) / 1e6:,.1f}" for end in (self.least, self.most))
        return (
            f"{self.parameters:,} parameters, {self.units} matrices or groups of them in {', '.join(self.schemes)}: "
            f"{ends} MB, about {memory / 1e6:,.0f} MB of memory"
        )

    def check(self, target: Target) -> None:
        """RecipeError for a size, or bits, that no allocation meets."""
        if target.kl is None:
            limit, other = self.limit(target)
            if not self.least <= limit - other <= self.most * (1 + TOLERANCE):
                raise self.out_of_reach(target)

    def out_of_reach(self, target: Target, kls: tuple[float, float] | None = None) -> RecipeError:
        """The error that says both bounds; kls: the predicted KL of each, if it is known."""
        ends = []
        for at, size in enumerate((self.least, self.most)):
            known = f", predicted KL {kls[at]:.3g}" if kls else ""
            ends.append(f"{self.other + size:,} bytes ({self.bits_per_weight(size):.3f} bits a weight{known})")
        reach = f"take {ends[0]}" if self.least == self.most else f"reach from {ends[0]} to {ends[1]}"
        message = f"{', '.join(self.schemes)} {reach}, not {target}"
        if target.by_plan:
            remedy = "a target between them, or other --schemes"
        elif self.least < self.most:
            remedy = "a --size or --bits between them"
        else:
            remedy = "leave out --size and --bits, and give --scheme"
        return RecipeError(message, where=str(self.model), remedy=remedy)


@dataclass(frozen=True)
class Estimate:
    """What is chosen from for a target, before any weight is read. memory: bytes that choosing takes."""

    sizes: Sizes
    format: str
    target: Target
    memory: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `--dry-run`."""
        sizes = self.sizes
        ends = {"smallest": sizes.least, "largest": sizes.most}
        return {
            "model": str(sizes.model),
            "format": self.format,
            "target": str(self.target),
            "schemes": list(sizes.schemes),
            "parameters": sizes.parameters,
            "units": sizes.units,
            **{f"{name}_bytes": sizes.other + size for name, size in ends.items()},
            **{f"{name}_bits_per_weight": round(sizes.bits_per_weight(size), 4) for name, size in ends.items()},
            "peak_memory_bytes": self.memory,
            "notes": list(self.notes),
        }


def data_bytes(plan: Plan) -> int:
    """Bytes of all weight data, without headers: what bits a weight count."""
    return round(plan.bits_per_weight * plan.parameters / 8)
