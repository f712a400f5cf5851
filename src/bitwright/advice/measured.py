"""Check what was expected by a short run."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.advice.advise import MEASURED_TOKENS, PROCESS, Advice, expected_speed
from bitwright.advice.machine import weights_per_second
from bitwright.errors import InputError
from bitwright.inference.speed import measure

ON_THE_WAY = "int4-g32"  # what a float model is rounded to on the way into memory: it fits every width


@dataclass(frozen=True)
class Check:
    """Tokens a second after a prompt: expected, and measured."""

    scheme: str
    expected: float
    measured: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measured(model: Path, advice: Advice) -> Check:
    """Run the model by `bitwright.load` for a few tokens. InputError for one that is stored quantized, predicts no next token,
    or does not fit the memory that is free; CheckpointError for one without weights."""
    shape, machine = advice.shape, advice.machine
    if shape.quantized:
        remedy = f"bitwright bench {model}"
        raise InputError(
            f"it is stored as {shape.stored}, which is not rounded again", where="--measure", remedy=remedy
        )
    (prompt, decode), scheme = MEASURED_TOKENS, ON_THE_WAY
    if not shape.predicts:
        raise InputError("an encoder predicts no next token", where="--measure", remedy="leave out --measure")
    needed = shape.weight_bytes(scheme) + shape.activation_bytes + PROCESS
    if needed > machine.available:
        message = f"a run in {scheme} needs {needed / 1e9:.1f} GB, {machine.available / 1e9:.1f} GB are free"
        raise InputError(message, where="--measure", remedy="leave out --measure, or free some memory")
    found = measure(model, scheme=scheme, prompt=prompt, decode=decode, repeat=2)
    known = replace(machine, bandwidth=found.bandwidth, weights={scheme: weights_per_second(scheme)})
    expected = expected_speed(shape, known, scheme, prompt + decode)
    assert expected is not None
    return Check(scheme, expected, found.decode_tokens_per_second)
