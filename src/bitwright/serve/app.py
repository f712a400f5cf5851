"""The HTTP side: routes, bodies, streams, clients that leave. It computes nothing; the engine does."""

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from bitwright.serve.answers import ChatShape, Choice, CompletionShape, Shape, event
from bitwright.serve.engine import Task
from bitwright.serve.failures import RequestError, broken
from bitwright.serve.job import End, Event, Job, Piece
from bitwright.serve.metrics import Metrics
from bitwright.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest, parsed
from bitwright.serve.service import Service
from bitwright.serve.tools import CallReader

BODY_SECONDS = 60  # in which a body must have come
DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499  # nobody sees it but the metrics


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


class Events:
    """What the engine delivers for one request, on the event loop's side."""

    def __init__(self, request: Request) -> None:
        self.queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []
        self.listening = asyncio.create_task(self._listen(request))

    def deliver(self, index: int, event: Event) -> None:
        """Called by the engine's thread."""
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

    async def _listen(self, request: Request) -> None:
        """Wait until the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)
        self.drop()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Each choice's pieces, until all choices have ended. Raises the RequestError of any, and ClientLeftError."""
        open_choices = len(self.jobs)
        while open_choices:
            got = await self.queue.get()
            if got is None:
                raise ClientLeftError
            index, found = got
            if isinstance(found, RequestError):
                raise found
            open_choices -= isinstance(found, End)
            yield index, found

    def close(self) -> None:
        """Let go: jobs that are not done are dropped by the engine."""
        self.listening.cancel()
        self.drop()

    def drop(self) -> None:
        """Let the engine forget what nobody waits for."""
        for job in self.jobs:
            job.cancel()


class Server:
    """The routes, over one service. key: what clients must send as a bearer token; None: nothing."""

    def __init__(self, service: Service, key: str | None) -> None:
        self.service, self.key, self.metrics = service, key, Metrics(service.engine)

    def app(self) -> Starlette:
        """The ASGI application; the engine runs while it does."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.service.engine.start()
            yield
            await asyncio.to_thread(self.service.engine.close)

        posts = {"chat/completions": self.chat, "completions": self.completions, "embeddings": self.embeddings}
        gets = {"models": self.models, "models/{name:path}": self.model}
        routes = [Route("/health", self.health), Route("/metrics", self.report)]
        routes += [Route(f"/v1/{path}", self._guarded(path, call), methods=["POST"]) for path, call in posts.items()]
        routes += [Route(f"/v1/{path}", self._guarded(path, call), methods=["GET"]) for path, call in gets.items()]
        return Starlette(
            routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route, Exception: _a_bug}
        )

    def _guarded(
        self, path: str, call: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that asks for the key, words failures, and counts."""

        async def answer(request: Request) -> Response:
            begun = time.monotonic()
            try:
                self._check_key(request)
                response = await call(request)
            except RequestError as failure:
                response = _refused(failure)
            except ClientLeftError:
                response = Response(status_code=CLIENT_LEFT)
            self.metrics.requests.labels(f"/v1/{path}", str(response.status_code)).inc()
            if not isinstance(response, StreamingResponse):
                self.metrics.seconds.observe(time.monotonic() - begun)
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            message = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise RequestError(401, message, code="invalid_api_key")

    async def health(self, request: Request) -> Response:
        """Whether the engine computes."""
        alive = self.service.engine.alive
        return JSONResponse({"status": "ok" if alive else "shutting down"}, 200 if alive else 503)

    async def report(self, request: Request) -> Response:
        """Prometheus' metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """That model by name."""
        self.service.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.service.name, "object": "model", "created": self.service.begun, "owned_by": "bitwright"}

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        asked = parsed(ChatRequest, await self._body(request))
        self.service.check_model(asked.model)
        template = str(self.service.tokenizer.chat_template)
        shape = ChatShape(
            asked.model, self.service.text_of, with_logprobs=bool(asked.logprobs), usage=asked.with_usage, each=asked.n
        )
        with_tools = asked.tools is not None and asked.tool_choice != "none"
        events = Events(request)
        return await self._answered(
            events,
            lambda: self.service.chat_jobs(asked, events.deliver),
            shape,
            lambda: Choice(CallReader(template) if with_tools else None),
            bool(asked.stream),
        )

    async def completions(self, request: Request) -> Response:
        """/v1/completions."""
        asked = parsed(CompletionRequest, await self._body(request))
        self.service.check_model(asked.model)
        shape = CompletionShape(
            asked.model,
            self.service.text_of,
            with_logprobs=asked.logprobs is not None,
            usage=asked.with_usage,
            each=asked.n,
        )
        events = Events(request)
        return await self._answered(
            events, lambda: self.service.completion_jobs(asked, events.deliver), shape, Choice, bool(asked.stream)
        )

    async def _answered(
        self,
        events: Events,
        jobs: Callable[[], list[Job]],
        shape: Shape,
        choice: Callable[[], Choice],
        streamed: bool,
    ) -> Response:
        """Queue the jobs of a request; the whole answer, or a stream of it."""
        with ExitStack() as left:
            left.callback(events.close)
            events.jobs = await asyncio.to_thread(jobs)
            self.service.engine.add(events.jobs)
            choices = [choice() for _ in events.jobs]
            if streamed:
                left.pop_all()  # the stream closes them
                return StreamingResponse(self._stream(events, shape, choices), media_type="text/event-stream")
            async for index, found in events:
                if isinstance(found, Piece):
                    choices[index].add(found)
                else:
                    choices[index].finish(found)
            return JSONResponse(shape.whole(choices))

    async def _stream(self, events: Events, shape: Shape, choices: list[Choice]) -> AsyncIterator[bytes]:
        """The chunks of an answer, as they come."""
        begun = time.monotonic()
        try:
            for index in range(len(choices)):
                for chunk in shape.begin(index):
                    yield event(chunk)
            async for index, found in events:
                for chunk in _chunks(shape, index, choices[index], found):
                    yield event(chunk)
            for chunk in shape.final(choices):
                yield event(chunk)
            yield DONE
        except RequestError as failure:
            yield event(failure.as_dict())
        except ClientLeftError:
            return
        finally:
            events.close()
            self.metrics.seconds.observe(time.monotonic() - begun)

    async def embeddings(self, request: Request) -> Response:
        """/v1/embeddings: the mean of the last hidden states, of length 1."""
        asked = parsed(EmbeddingRequest, await self._body(request))
        self.service.check_model(asked.model)
        if asked.dimensions not in (None, width := self.service.generator.model.config.hidden_size):
            message = f"This model's embeddings have {width} dimensions; others are not supported."
            raise RequestError(400, message, param="dimensions")
        texts = await asyncio.to_thread(self.service.encoded, asked.inputs, "input")
        for ids in texts:
            self.service.check_length(ids, "input")
        found = []
        for ids in texts:
            if await request.is_disconnected():
                raise ClientLeftError
            found.append(await self._computed(partial(self.service.embedding, ids)))
        rows = [
            {"object": "embedding", "index": i, "embedding": _vector(one, asked.encoding_format)}
            for i, one in enumerate(found)
        ]
        count = sum(map(len, texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": rows, "model": asked.model, "usage": usage})

    async def _computed(self, run: Callable[[], Tensor]) -> Tensor:
        """What a computation in the engine's thread gives. Raises its RequestError."""
        loop, promise = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def done(found: Tensor | RequestError) -> None:
            loop.call_soon_threadsafe(settle, found)

        def settle(found: Tensor | RequestError) -> None:
            if promise.done():
                return
            if isinstance(found, RequestError):
                promise.set_exception(found)
            else:
                promise.set_result(found)

        deadline = time.monotonic() + self.service.limits.seconds
        task = Task(run, done, deadline)
        self.service.engine.add_task(task)
        try:
            return await promise
        finally:
            task.cancelled = True

    async def _body(self, request: Request) -> Any:
        """A request's JSON. RequestError 413 for one that is too large, 408 for one that does not come, 400 for none."""
        most, got = self.service.limits.body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    got += part
                    if len(got) > most:
                        raise RequestError(
                            413, f"The body of the request is larger than {most} bytes.", code="request_too_large"
                        )
        except TimeoutError:
            raise RequestError(408, f"The body of the request did not come within {BODY_SECONDS} seconds.") from None
        except ClientDisconnect:
            raise RequestError(
                400, "The client left before the body of its request had come."
            ) from None  # nobody reads it
        try:
            found = json.loads(got)
            if b"\\u" in got:  # half of a pair of UTF-16 by itself is no text: a ValueError
                json.dumps(found, ensure_ascii=False).encode()
            return found
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            message = f"We could not parse the JSON body of your request: {reason}."
            raise RequestError(400, message, code="invalid_json") from None


def _chunks(shape: Shape, index: int, choice: Choice, found: Piece | End) -> list[dict[str, Any]]:
    """The chunks of one event."""
    if isinstance(found, End):
        return shape.last(index, choice, choice.finish(found))
    before = choice.text
    piece = choice.add(found)
    return [shape.chunk(index, piece, before)] if piece.text or piece.tokens else []


def _vector(x: Tensor, form: str | None) -> list[float] | str:
    return base64.b64encode(x.numpy().tobytes()).decode() if form == "base64" else x.tolist()


def _refused(failure: RequestError) -> Response:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(failure.status)
    return JSONResponse(failure.as_dict(), failure.status, headers)


async def _a_bug(request: Request, error: Exception) -> Response:
    """The answer to a request on which the server failed; the traceback is printed."""
    return _refused(broken(error))


async def _no_route(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}."
        return JSONResponse(RequestError(405, message, code="method_not_allowed").as_dict(), 405, error.headers)
    message = f"Invalid URL ({request.method} {request.url.path})"
    return JSONResponse(RequestError(error.status_code, message, code="unknown_url").as_dict(), error.status_code)
