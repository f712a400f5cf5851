"""The commands that train an adapter, and that make one model of it and its base: finetune, merge."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli.console import (
    AsJson,
    Out,
    Quiet,
    Resume,
    Samples,
    Seed,
    Seqlen,
    check_model,
    console,
    plain,
    progress_bar,
    reporting,
    show,
)

if TYPE_CHECKING:
    from bitwright.evaluation.merge import Merged

Base = Annotated[
    Path, typer.Argument(help="Directory of the float checkpoint that the adapter is for, or a .gguf file.")
]
Trained = Annotated[Path, typer.Argument(help="Directory of a LoRA adapter, as peft and `bitwright finetune` save it.")]


def finetune(
    model: Annotated[Path, typer.Argument(help="Directory or .gguf file, float or quantized.")],
    out: Annotated[
        Path, typer.Argument(help="Directory to make: a LoRA adapter in peft's form; with --scales-only a model.")
    ],
    data: Annotated[
        str, typer.Option(help="UTF-8 text, or .jsonl of conversations, of which the answers are learned.")
    ],
    scheme: Annotated[
        str | None,
        typer.Option(help="What a float model's matrices are rounded to: nf4-g64-dq by default; float: they stay."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Its alpha; by default twice the rank.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by the root of the rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Train magnitudes too (DoRA).")] = False,
    targets: Annotated[str | None, typer.Option(help="Module names, with commas between; all linear layers.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 300,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    lr: Annotated[
        float | None,
        typer.Option(help="Largest learning rate, reached after a rise, then a cosine; 2e-4, with --scales-only 1e-3."),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="Where the adapter begins: zero, or residual: what MODEL's rounding of --teacher lost, in its rank."
        ),
    ] = "zero",
    scales_only: Annotated[
        bool,
        typer.Option("--scales-only", help="Train the scales and norms of a quantized MODEL, instead of an adapter."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the adapter's start and the order of windows.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    teacher: Annotated[
        Path | None, typer.Option(help="A model whose predictions are learned (KL), such as the float original.")
    ] = None,
    resume: Resume = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter beside a model's quantized weights (QLoRA), on text or on the answers of conversations."""
    with reporting(as_json, f"checkpoints are kept in {out}.partial; the same command goes on from the last"):
        check_model(model, teacher)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of lacking a product that is not used here
        from bitwright.train.finetune import finetune as trained
        from bitwright.train.settings import Training

        how = Training(
            scheme=scheme, rank=rank, alpha=alpha, rslora=rslora, dora=dora,
            targets=None if targets is None else tuple(targets.split(",")), steps=steps, batch=batch, seqlen=seqlen, lr=lr,
            seed=seed, save_every=save_every, teacher=teacher, init=init, scales_only=scales_only,
        )  # fmt: skip
        with progress_bar(as_json or quiet) as progress:
            done = trained(model, out, data=data, how=how, resume=resume, progress=progress)
        found = done.as_dict()
        if as_json or not quiet:
            show(found if as_json else {key: value for key, value in found.items() if key != "losses"}, as_json, "Done")


def merge(
    model: Base,
    adapter: Trained,
    out: Out,
    scheme: Annotated[str | None, typer.Option(help="Number format, as for quantize.")] = None,
    method: Annotated[str | None, typer.Option(help="Rounding method, as for quantize; by default gptaq.")] = None,
    format: Annotated[str | None, typer.Option(help="File format, as for quantize.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of rules for single layers.")] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text of what the adapter was trained on: a UTF-8 file, or .jsonl of conversations. Needed unless --text is "
            "given; then by default general."
        ),
    ] = None,
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    text: Annotated[
        str | None, typer.Option(help="Text to judge on; by default the last tenth of --calib, which is then held out.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Judge on so many tokens.")] = 8192,
    eval_seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window of that text.")] = 256,
    compared: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare",
            help="Judge rounding to nearest, and the quantized base with the adapter beside it, too.",
        ),
    ] = True,
    resume: Resume = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model with a LoRA adapter added to it, and measure how near that comes to the adapted model."""
    with reporting(as_json, f"finished blocks are kept in {out}.partial; the same command goes on with them"):
        check_model(model, adapter)
        from bitwright.evaluation.merge import Settings
        from bitwright.evaluation.merge import merge as merged

        settings = Settings(
            scheme=scheme, method=method, format=format, recipe=recipe, calib=calib, samples=samples, seqlen=seqlen,
            seed=seed, text=text, tokens=tokens, eval_seqlen=eval_seqlen, compared=compared,
        )  # fmt: skip
        with progress_bar(as_json or quiet) as progress:
            done = merged(model, adapter, out, settings=settings, resume=resume, progress=progress)
        _print_merged(done, as_json=as_json, quiet=quiet)
    if done.result.fallbacks or done.worse:
        raise typer.Exit(1)


def _print_merged(done: "Merged", *, as_json: bool, quiet: bool) -> None:
    """The ways in a table; quiet: only what is worse than asked."""
    if as_json:
        show(done.as_dict(), True, "")
        return
    from bitwright.evaluation.report import table

    for note in () if quiet else done.result.notes:
        console.print(f"note: {plain(note)}", highlight=False)
    if not quiet:
        head = ("", "perplexity", "KL to the adapted model", "top-1", "gain kept")
        rows = [
            (
                w.name,
                f"{w.perplexity:.3f}",
                f"{w.kl_mean:.5f} ± {w.kl_stderr:.5f}",
                f"{w.top1:.1%}",
                f"{w.gain_kept:.0%}",
            )
            for w in done.ways
        ]
        console.print(table(f"{done.text}, {done.tokens:,} tokens", head, rows))
        before, after = done.base_perplexity, done.adapted_perplexity
        console.print(f"perplexity of the base {before:.3f}, with the adapter in float {after:.3f}", highlight=False)
        console.print(f"{done.result.out}: {done.result.bits_per_weight:.2f} bits a weight", highlight=False)
    for fallback in done.result.fallbacks:
        console.print(f"[yellow]worse than asked[/] {plain(fallback)}", highlight=False)
    if done.worse:
        console.print(f"[yellow]worse than asked[/] {done.worse} comes nearer to the adapted model", highlight=False)
