"""Run the server: a port that is free, until SIGTERM or Ctrl-C; then what has begun is ended first."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from types import FrameType
from typing import Any

import uvicorn

from bitwright.errors import InputError
from bitwright.serve.app import Server
from bitwright.serve.service import Service

GRACE = 30  # seconds that answers have to end, once the server must
SLACK = 60  # seconds beyond a request's own time that a client may take to read its answer

Scope = MutableMapping[str, Any]
Call = Callable[..., Awaitable[Any]]


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, so that no other server can take it while the model is read: who calls meanwhile
    waits. InputError if the address is taken, or not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()
    except (OSError, OverflowError) as error:
        remedy = f"give another one: --port {port + 1 if port < 65535 else 8080}, or --host 127.0.0.1"
        raise InputError(f"cannot listen at {host}:{port}: {error}", remedy=remedy) from error
    return found


def run(service: Service, listening: socket.socket, key: str | None) -> None:
    """Serve until a signal says to end."""
    app = _timed(Server(service, key).app(), service.limits.seconds + SLACK)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, timeout_keep_alive=75, ws="none")
    before = signal.signal(signal.SIGTERM, _ignored)  # uvicorn raises it once more at the end
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignored(_: int, __: FrameType | None) -> None:
    """The server has ended already."""


def _timed(app: Call, seconds: float) -> Call:
    """An application that hangs up on a request that takes longer, as on a client that does not read."""

    async def bounded(scope: Scope, receive: Call, send: Call) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        try:
            async with asyncio.timeout(seconds):
                await app(scope, receive, send)
        except TimeoutError:
            return None
        return None

    return bounded
