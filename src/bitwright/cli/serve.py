"""The command that serves a model over HTTP."""

import ipaddress
from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated

import typer

from bitwright.cli.console import check_model, errors, plain, reporting
from bitwright.cli.inference import Bits, Context, KeysAndValues, Lookahead, Model, Rounded

NEEDED = ("starlette", "uvicorn", "prometheus_client", "llguidance", "pydantic")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines reach 0.0.0.0 or ::.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8080,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Answers written at once.")] = 4,
    context: Context = 4096,
    kv: KeysAndValues = None,
    lookahead: Lookahead = 0,
    scheme: Rounded = None,
    activations: Bits = 16,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the name of its file.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="BITWRIGHT_API_KEY", help="Bearer token that clients must send.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are told to come back.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, waiting included.")] = 600,
) -> None:
    """Serve a model over HTTP by OpenAI's API: chat, completions, embeddings."""
    with reporting(False):
        _check_installed()
        check_model(model)
        from bitwright.serve.server import bound, run
        from bitwright.serve.service import Limits, Service

        listening = bound(host, port)
        service = Service.open(
            model,
            name=name,
            limits=Limits(queue, timeout),
            scheme=scheme,
            activations=activations,
            context=context,
            kv=kv,
            lookahead=lookahead,
            slots=parallel,
        )
        if api_key is None and not _is_loopback(listening.getsockname()[0]):
            errors.print(f"[yellow]note[/] whoever reaches {plain(host)} can use this server: --api-key asks for a key")
        address = f"[{host}]" if ":" in host else host
        print(
            f"{service.name} at http://{address}:{listening.getsockname()[1]}/v1: {parallel} answers at once, "
            f"context {service.generator.context}",
            flush=True,
        )
        with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
            run(service, listening, api_key)


def _check_installed() -> None:
    """InputError if what the server is built on was not installed."""
    from bitwright.errors import InputError

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}", remedy='pip install "bitwright[serve]"')


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
