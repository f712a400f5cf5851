"""Commands on files: `inspect`, `imatrix`, `convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitwright.cli.console import (
    AsJson,
    Calib,
    Model,
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


def inspect(model: Model, as_json: AsJson = False) -> None:
    """Every tensor: shape, scheme, bytes, loss; total bits per weight; of a .gguf file its tokenizer, templates and keys."""
    with reporting(as_json):
        check_model(model)
        from bitwright.evaluation.gguf_inspection import lines
        from bitwright.evaluation.inspection import inspect as inspected
        from bitwright.evaluation.report import table

        found = inspected(model)
        if as_json:
            show(found, True, "")
            return
        rows = [_inspected(t) for t in found["tensors"]]
        console.print(table(str(model), ("tensor", "shape", "scheme", "bytes", "loss"), rows))
        for line in lines(found) if "keys" in found else []:
            console.print(plain(line), highlight=False, soft_wrap=True)
        console.print(f"{found['bytes']:,} bytes of weights, {found['bits_per_weight']:.3f} bits per weight")


def _inspected(t: dict[str, Any]) -> tuple[str, ...]:
    """A tensor's row of the table."""
    loss = "" if t["loss"] is None else f"{t['loss']:.5f}"
    name = t["name"].removesuffix(".weight")
    return name, "×".join(map(str, t["shape"])), t["scheme"], f"{t['bytes']:,}", loss


def imatrix(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Importance matrix to make, for llama-quantize --imatrix.")],
    calib: Calib = "general",
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write the mean squared inputs of every matrix as llama.cpp's importance matrix."""
    with reporting(as_json):
        check_model(model)
        from bitwright.pipeline.importance import write_importance

        with progress_bar(as_json) as progress:
            done = write_importance(
                model, out, calib=calib, samples=samples, seqlen=seqlen, seed=seed, progress=progress
            )
        show(done, as_json, "Done")


def convert(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(help="OUT.gguf to make of a float MODEL or an adapter, or a directory of a quantized one."),
    ],
    format: Annotated[
        str | None, typer.Option(help="compressed-tensors, gptq, awq, bitsandbytes or bitwright, for a directory.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Where MODEL is a LoRA adapter, in peft's form or a .gguf file: the model that it is for."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a checkpoint into another container, number by number the same, or say why that cannot be."""
    with reporting(as_json, f"{out} was not made; the same command starts afresh"):
        check_model(model, base)
        from bitwright.pipeline.conversion import convert

        show(convert(model, out, format, base=base), as_json, "Done")
