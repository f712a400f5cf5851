"""The command that plans a recipe: spend bytes where they save most KL."""

from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli.console import (
    AsJson,
    DryRun,
    Quiet,
    Requantize,
    Samples,
    Seed,
    Seqlen,
    announce,
    check_model,
    errors,
    plain,
    progress_bar,
    reporting,
    say,
    show,
    size,
)

if TYPE_CHECKING:
    from bitwright.pipeline.planned_recipe import PlannedRecipe

Model = Annotated[Path, typer.Argument(help="Directory with a checkpoint, .gguf file, or name on the hub.")]
Bits = Annotated[float | None, typer.Option(help="Bits a weight, of all weight data.")]
Size = Annotated[str | None, typer.Option(help="Bytes of the result: 100MB, 6GiB.")]
KEPT = "scores are kept in {}; the same command goes on with them"


def plan(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Recipe to make, for quantize --recipe.")],
    bits: Bits = None,
    size: Size = None,
    kl: Annotated[float | None, typer.Option(help="Predicted KL, nats a token: the fewest bytes for it.")] = None,
    format: Annotated[str, typer.Option(help="gguf, compressed-tensors, gptq or bitwright.")] = "compressed-tensors",
    schemes: Annotated[str | None, typer.Option(help="Candidates, with commas between; keep: in float.")] = None,
    method: Annotated[str, typer.Option(help="The method that quantize will use.")] = "gptaq",
    keep: Annotated[
        list[str] | None, typer.Option(help="Pattern of matrices that stay in float; again for more.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Round inputs too where it costs least, such as int8-token.")
    ] = None,
    activations_kl: Annotated[
        float | None, typer.Option(help="Predicted KL that rounding inputs may add, such as 0.005.")
    ] = None,
    calib: Annotated[str, typer.Option(help="Calibration text, as for quantize.")] = "general",
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    measure: Annotated[
        int, typer.Option(help="Measure what each unit's next smaller scheme costs, and plan anew, so often at most.")
    ] = 0,
    scores: Annotated[
        Path | None, typer.Option(help="Directory that keeps the scores: another target then takes seconds.")
    ] = None,
    requantize: Requantize = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe that spends a number of bits, or bytes, where they save most KL; or the fewest bytes for a KL."""
    with reporting(
        as_json, KEPT.format(scores) if scores else "nothing was written; give --scores to keep what is done"
    ):
        check_model(model)
        from bitwright.files.checkpoint import write_file
        from bitwright.pipeline.planned_recipe import Settings, estimated, plan_recipe
        from bitwright.pipeline.work_in_progress import check_out
        from bitwright.plan.target import Target

        check_out(out)
        target = Target.parse(size, bits, kl)
        tried = None if schemes is None else tuple(name.strip().lower() for name in schemes.split(","))
        settings = Settings(
            format, tried, method, tuple(keep or ()), calib, samples, seqlen, seed, activations, activations_kl, measure,
            requantize,
        )  # fmt: skip
        if dry_run:
            show(estimated(model, target, settings, scores=scores).as_dict(), as_json, "Preflight")
            return
        with progress_bar(as_json or quiet) as progress:
            said = partial(announce, quiet=as_json or quiet)
            made = plan_recipe(model, target, settings, scores=scores, progress=progress, announce=said)
        write_file(out, made.text.encode())
        if as_json:
            show({"recipe": str(out), **made.as_dict()}, True, "")
        elif not quiet:
            _print(made, model, out, " --requantize" if requantize else "")


def _print(made: "PlannedRecipe", model: Path, out: Path, more: str) -> None:
    """What each kind of matrix was given, sizes, and what to do next."""
    for note in made.notes:
        say(f"note: {plain(note)}", errors)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for one in made.given:
        kinds["+".join(pattern.rpartition(".")[2] for pattern in one.patterns)][one.whole] += 1
    for kind, given in kinds.items():
        say(f"{plain(kind)}: {', '.join(f'{n} {scheme}' for scheme, n in given.most_common())}")
    bounds = " to ".join(size(end[0]) for end in made.bounds)
    say(
        f"{size(made.plan.bytes)}, {made.plan.bits_per_weight:.3f} bits a weight, predicted KL {made.kl:.4f} "
        f"(these schemes reach {bounds})"
    )
    result = "OUT.gguf" if made.plan.format.one_file else f"OUT --format {made.plan.format.name}"
    command = f"bitwright quantize {model} {result} --recipe {out}{more}"
    say(f"carry it out: {plain(command)}")
