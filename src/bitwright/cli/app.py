"""The command line: parse, call, print."""

import gc
import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli.advise import advise
from bitwright.cli.console import (
    AsJson,
    Calib,
    Device,
    DryRun,
    Model,
    Out,
    Quiet,
    Requantize,
    Resume,
    Samples,
    Seed,
    Seqlen,
    announce,
    check_model,
    console,
    errors,
    interruption,
    launched,
    plain,
    progress_bar,
    reporting,
    say,
    show,
    speaks,
)
from bitwright.cli.files import convert, imatrix, inspect
from bitwright.cli.inference import KeysAndValues, bench, chat, generate
from bitwright.cli.plan import Bits, Size, plan
from bitwright.cli.serve import serve
from bitwright.cli.training import finetune, merge
from bitwright.version import __version__

if TYPE_CHECKING:
    from bitwright.evaluation.evaluate import Evaluation
    from bitwright.pipeline.result import Result

ABOUT = (
    "Make trained networks smaller and faster by quantization, and prove what it cost.\n\n"
    "With --json every command prints one JSON object on standard output and nothing else. Exit status: 0 done; "
    "1 something was quantized worse than asked, or did not verify; 2 bad input or usage, nothing written; 130 interrupted."
)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=ABOUT)

Method = Annotated[
    str | None,
    typer.Option(
        help="rtn, search, hqq, obq, gptq, gptaq or autoround, behind transforms where wanted: awq+gptq. "
        "By default gptaq; with --store gptq; behind smooth where --activations rounds inputs."
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Round the layers' inputs too: int8-token or fp8-token as they come, int8-tensor to a fixed range."
    ),
]
Observer = Annotated[str, typer.Option(help="Fixed ranges by minmax, average, percentile, mse or kl.")]
Prune = Annotated[
    str | None,
    typer.Option(
        help="Set weights to zero first: wanda:0.5, magnitude:0.3, sparsegpt:0.5; sparsegpt:2:4 keeps 2 of every 4."
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(help="Directory of statistics of the float model: used if they are there, taken if they are not."),
]
Text = Annotated[str, typer.Option(help="Text to judge on: a UTF-8 file, or stdlib-heldout.")]
Tokens = Annotated[int | None, typer.Option(min=2, help="Judge on so many tokens; the whole text otherwise.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Every kind of tensor, with all that is known of it.")]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        help="GGUF: NAME=TYPE, a block type for tensors that the regular expression NAME is found in; repeatable."
    ),
]
HeadType = Annotated[str | None, typer.Option(help="GGUF: the output head's block type.")]
EmbeddingType = Annotated[str | None, typer.Option(help="GGUF: the embedding's block type.")]
WrittenFormat = Annotated[
    str | None,
    typer.Option(
        help="compressed-tensors unless OUT's name or the scheme needs another: gptq, awq, bitsandbytes, gguf, bitwright."
    ),
]
Engine = Annotated[
    str | None, typer.Option(help="Round inputs as this engine does: llama.cpp (.gguf files). In float otherwise.")
]
KEPT = "finished blocks are kept in {}.partial; the same command goes on with them, --restart discards them"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What all commands share."""


@app.command()
def quantize(
    model: Model,
    out: Out,
    scheme: Annotated[str | None, typer.Option(help="Number format: int4-g128, int3-g64-asym, q4_k_m, ...")] = None,
    method: Method = None,
    format: WrittenFormat = None,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: one block type everywhere, no mix.")] = False,
    tensor_type: TensorType = None,
    output_tensor_type: HeadType = None,
    token_embedding_type: EmbeddingType = None,
    activations: Activations = None,
    observer: Observer = "mse",
    kv_cache: Annotated[str | None, typer.Option(help="Keep keys and values in int8-tensor or fp8-tensor.")] = None,
    prune: Prune = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of rules for single layers.")] = None,
    size: Size = None,
    bits: Bits = None,
    calib: Calib = "general",
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    store: Store = None,
    requantize: Requantize = False,
    device: Device = "cpu",
    resume: Resume = True,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint, read back what was written, and record what happened to every tensor."""
    quiet = quiet or not speaks()
    with reporting(as_json, KEPT.format(out), quiet=quiet):
        check_model(model)
        from bitwright.pipeline.options import QuantizeOptions
        from bitwright.pipeline.quantize import carried_out, check_calibration, estimated, planned
        from bitwright.plan.tensor_types import TensorTypes

        options = QuantizeOptions(
            scheme=scheme, method=method, format=format, pure=pure, activations=activations, observer=observer,
            types=TensorTypes(tuple(tensor_type or ()), output_tensor_type, token_embedding_type), kv_cache=kv_cache,
            prune=prune, recipe=recipe, size=size, bits=bits, calib=calib, samples=samples, seqlen=seqlen, seed=seed,
            store=store, requantize=requantize, device=device, resume=resume, distributed=launched(),
        )  # fmt: skip
        if dry_run and options.for_target:
            return show(estimated(model, out, options).as_dict(), as_json, "Preflight") if speaks() else None
        with progress_bar(as_json or quiet) as progress:
            plan = planned(model, out, options, progress=progress, announce=partial(announce, quiet=as_json or quiet))
        if dry_run:
            check_calibration(plan, options)
            return show(plan.as_dict(), as_json, "Preflight") if speaks() else None
        announce(plan.headline, quiet=as_json or quiet)
        with progress_bar(as_json or quiet) as progress:
            done = carried_out(plan, out, options, progress=progress)
        if speaks():
            _print_result(done, model, told=plan.notes, as_json=as_json, quiet=quiet, verbose=verbose)
    # Of several processes one says it: torchrun ends the others at the first status that is not 0.
    raise typer.Exit(1 if done.fallbacks and speaks() else 0)


@app.command()
def compare(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Directory to make: every candidate, a table (JSON) and a page (HTML).")],
    schemes: Annotated[str, typer.Option(help="Number formats, with commas between.")] = "int4-g128,int3-g128",
    methods: Annotated[
        str, typer.Option(help="Methods, with commas between.", show_default="rtn, search, awq, gptq, awq+gptq")
    ] = "rtn,search,awq,gptq,awq+gptq",
    mixes: Annotated[str, typer.Option(help="Mixes of llama.cpp's types, such as q4_k_m, with commas between.")] = "",
    recipe: Annotated[
        list[Path] | None, typer.Option(help="Recipe that competes too, such as a plan; again for more.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="File format; the first that can hold a candidate.")] = None,
    activations: Activations = None,
    observer: Observer = "mse",
    calib: Calib = "general",
    samples: Samples = 128,
    seqlen: Seqlen = 2048,
    seed: Seed = 0,
    text: Text = "stdlib-heldout",
    tokens: Tokens = None,
    eval_seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window of that text.")] = 256,
    store: Store = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Statistics block by block for every candidate, as quantize does.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the candidates, or only what they cost.")] = True,
    device: Device = "cpu",
    resume: Resume = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Try many methods and number formats on one model: one calibration pass, one table, one page."""
    kept = f"what is finished is kept in {out}; the same command goes on with it"
    with reporting(as_json, kept, quiet=quiet), progress_bar(as_json or quiet) as progress:
        check_model(model)
        from bitwright.evaluation.compare import compare as run_all
        from bitwright.evaluation.contests import Settings
        from bitwright.evaluation.report import comparison_table

        settings = Settings(
            calib, samples, seqlen, seed, text, tokens, eval_seqlen, activations, observer, format, sequential, keep, device
        )  # fmt: skip
        done = run_all(
            model, out, schemes=_names(schemes), methods=_names(methods), mixes=_names(mixes), recipes=recipe or [],
            settings=settings, store=store, resume=resume, command=" ".join(["bitwright", *sys.argv[1:]]), progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(done.as_dict()))
    else:
        console.print(comparison_table(done.original, done.candidates))
        for note in done.notes:
            console.print(f"[yellow]note[/] {plain(note)}")
        console.print(f"{done.out / 'compare.html'}", highlight=False)
    if done.refused or any(one.fallbacks for one in done.candidates):
        raise typer.Exit(1)


def _names(given: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in given.split(",") if name.strip()]


@app.command("eval")
def evaluate(
    model: Model,
    reference: Annotated[
        Path | None, typer.Option(help="The original, to measure KL and top-1 agreement against.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to judge on: a UTF-8 file, or stdlib-heldout; give the option again for more texts.",
            show_default="stdlib-heldout",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put the text into the model's chat template: a .jsonl of conversations, or paragraphs in turn as user and "
            "assistant.",
        ),
    ] = False,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    tokens: Tokens = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Directory to keep what the reference predicts in, for other evaluations.")
    ] = None,
    engine: Engine = None,
    device: Device = "cpu",
    kv: KeysAndValues = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity on texts and, with --reference, KL divergence and top-1 agreement; and what that means."""
    with reporting(as_json):
        check_model(model, reference)
        from bitwright.evaluation.evaluate import evaluate as judge
        from bitwright.system.device import device_of

        with progress_bar(as_json or not errors.is_terminal) as progress:
            found = judge(
                model, reference=reference, texts=text or ["stdlib-heldout"], seqlen=seqlen, tokens=tokens,
                predictions=predictions, engine=engine, kv=kv, chat=chat, device=device_of(device), progress=progress,
            )  # fmt: skip
        _print_evaluations(found, as_json)


def _print_evaluations(found: "list[Evaluation]", as_json: bool) -> None:
    """A row for each text and what it means; or everything as JSON."""
    from bitwright.evaluation.report import evaluation_table
    from bitwright.evaluation.verdict import verdict

    whole = [one.as_dict() for one in found]
    if as_json:
        show(whole[0] if len(whole) == 1 else {"texts": whole}, True, "")
        return
    console.print(evaluation_table(found))
    for line in (*(f"note: {note}" for note in found[0].notes), *verdict(found)):
        console.print(plain(line), highlight=False)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """The whole main job on the built-in model: no network, under two minutes."""
    with reporting(as_json), progress_bar(as_json) as progress:
        from bitwright.cli.demo import HEADER
        from bitwright.cli.demo import demo as run_demo
        from bitwright.evaluation.report import table

        rows = run_demo(lambda line: None if as_json else errors.print(line, highlight=False), progress)
    if as_json:
        print(json.dumps([dict(zip(HEADER, row, strict=True)) for row in rows]))
    else:
        console.print(table("The built-in model, evaluated on modules held out of its training", HEADER, rows))


for command in (inspect, imatrix, convert, plan, advise, generate, chat, serve, bench, finetune, merge):
    app.command()(command)


def _print_result(
    done: "Result", model: Path, *, told: tuple[str, ...] = (), as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Print a run's result; told: notes that the headline had; quiet: only what is worse than asked; verbose: every tensor."""
    from bitwright.cli.summary import replaced, summary
    from bitwright.evaluation.report import ledger_table

    if as_json:
        show(done.as_dict(), True, "")
        return
    if verbose:
        console.print(ledger_table(done.ledger))
    for note in () if quiet else (note for note in done.notes if note not in told):
        say(f"note: {plain(note)}")
    for fallback in done.fallbacks if verbose else ():
        console.print(f"[yellow]worse than asked[/] {plain(fallback)}", highlight=False)
    for line in replaced(done) if quiet and not verbose and done.fallbacks else ():
        say(plain(line))
    for line in () if quiet else summary(done, model):
        say(plain(line))


def main() -> None:
    """Entry point."""
    # OpenMP threads that wait for work spin for some microseconds, then sleep. Rounding is a chain of small steps: if they
    # slept at once it would take twice as long on an idle machine; if they spun on, the default, up to eight times as
    # long on a busy one. Must be set before torch loads OpenMP.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large tensors on large pages, which are read 3 % faster
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies nothing here: its threads only wait, busily
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Importing torch and transformers makes a million objects that stay: have the garbage collector look at them rarely, and
    # skip taking them apart at exit, which takes as long as a small command.
    gc.set_threshold(100_000)
    interruption.listen()
    try:
        app()
    except SystemExit as end:
        with suppress(OSError):  # nobody may be listening any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
