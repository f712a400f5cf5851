"""The result of a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.pipeline.ledger import Entry


@dataclass(frozen=True)
class Result:
    """The result of a run; `as_dict` is the command line's JSON."""

    out: Path
    bytes: int
    bits_per_weight: float
    seconds: float
    peak_rss_bytes: int
    ledger: list[Entry] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def fallbacks(self) -> list[str]:
        """What was quantized otherwise than asked, a sentence each."""
        return [f"{entry.name}: {entry.fallback}" for entry in self.ledger if entry.fallback]

    def as_dict(self) -> dict[str, Any]:
        """{out, bytes, bits_per_weight, seconds, peak_rss_bytes, tensors, fallbacks}."""
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes,
            "tensors": len(self.ledger),
            "fallbacks": self.fallbacks,
        }
