"""The command that advises: what fits this machine, how fast, and what to take."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.advice.engines import UNREAD
from bitwright.cli.console import AsJson, check_model, console, plain, reporting, show, size

if TYPE_CHECKING:
    from bitwright.advice.advise import Advice

WIDTH = 80


def advise(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory, .gguf file, or a config.json by itself.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the KV cache; by default 4096, or what the model knows.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Only what this engine runs: vLLM, llama.cpp, ...")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Check the expected speed by a short run of the model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What of a model fits this machine, how fast it will be, and which scheme, method, format and engine to take."""
    with reporting(as_json):
        if measure or model.suffix != ".json":  # a config.json by itself has no weights to measure
            check_model(model)
        from bitwright.advice.advise import CPU_SCHEMES, check_engine, context_of
        from bitwright.advice.advise import advise as advice_for
        from bitwright.advice.machine import this_machine
        from bitwright.advice.measured import measured
        from bitwright.advice.model_shape import shape_of

        shape = shape_of(model)
        context_of(shape, context)  # both are refused before the machine is measured
        check_engine(engine)
        machine = this_machine(CPU_SCHEMES)
        found = advice_for(shape, machine, model=str(model), context=context, engine=engine)
        run = measured(model, found) if measure else None
        if as_json:
            show({**found.as_dict(), "measured": run.as_dict() if run else None}, True, "")
            return
        _print(found)
        if run is not None:
            _say(f"measured: {run.measured:.1f} tokens a second in {run.scheme}, expected {run.expected:.1f}")


def _say(line: str) -> None:
    for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
        console.print(plain(part), highlight=False, soft_wrap=True)


def _print(found: "Advice") -> None:
    """The machine, the model, a row for each scheme, and the recommendation."""
    machine, shape = found.machine, found.shape
    _say(f"machine: {machine.cpu}, {machine.cores} cores, {', '.join(machine.instructions) or 'no vector instructions'}, "
         f"{size(machine.memory)} ({size(machine.available)} free), reads {machine.bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    _say("products: " + ", ".join(f"{kind} {rate / 1e9:.3g} GOP/s" for kind, rate in machine.products.items()))
    if machine.busy:
        _say(f"note: {machine.load:.0f} processes were waiting for the cores, so all speeds here are too low")
    for gpu in machine.gpus:
        _say(f"GPU: {gpu.name}, {size(gpu.memory)}, compute capability {gpu.capability[0]}.{gpu.capability[1]}")
    _say(f"model: {shape.name}, {shape.parameters:,} parameters, stored as {shape.stored}; {4 * shape.parameters / 1e9:.4g} GB "
         f"in float32; context {found.context}")  # fmt: skip
    console.print(f"{'scheme':<13}{'bits':>7}{'weights':>11}{'KV cache':>11}{'in all':>11}  {'fits':<5}{'tokens/s':>9}")
    for fit in found.fits:
        speed = "" if fit.tokens_per_second is None else f"{fit.tokens_per_second:.1f}"
        console.print(
            f"{fit.scheme:<13}{fit.bits_per_weight:>7.2f}{size(fit.weights):>11}{size(fit.cache):>11}{size(fit.whole):>11}  "
            f"{'yes' if fit.fits else 'no':<5}{speed:>9}",
            highlight=False,
        )
    if found.scheme:
        _say(f"take {found.scheme} by {found.method}, as {found.format}, for {found.engine}")
    for reason in found.why:
        _say(f"because: {reason}" if found.scheme else reason)
    _say(f"training for it (QAT): {found.training}")
    for row in found.engines:
        _say(f"{row.engine}: {row.what}")
    for read in dict.fromkeys(row.read for row in found.engines if row.source):
        sources = dict.fromkeys(row.source for row in found.engines if row.source and row.read == read)
        for line in [f"sources, {read}:" if read == UNREAD else f"sources, read {read}:", *sources]:
            console.print(plain(line), highlight=False, soft_wrap=True)
    if found.command:
        console.print(plain(found.command), highlight=False, soft_wrap=True)
