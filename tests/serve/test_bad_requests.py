"""What clients and users do wrong: errors as OpenAI words them, status 2 on the command line, nothing left running."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.errors import InputError
from bitwright.serve.server import bound
from bitwright.serve.service import Limits
from conftest import make_checkpoint
from serve.running import KEY, Running, until

USER = [{"role": "user", "content": "x"}]
CHAT = {"model": "tiny", "messages": USER}
LIMITS = Limits(queue=1, seconds=600, body=20_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=2, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    one = Running(model, limits=LIMITS, slots=1, scheme="int8-g32", context=3000)
    yield one
    one.close()


def post(
    running: Running, body: bytes | dict[str, Any], path: str = "chat/completions", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of an answer to any bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", int(running.url.rsplit(":", 1)[1]), timeout=30)
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", f"/v1/{path}", given, {"authorization": f"Bearer {KEY}"} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


BAD: dict[str, tuple[bytes | dict[str, Any], str | None, str]] = {
    "no JSON": (b"{", None, "could not parse"),
    "no UTF-8": (b"\xff{}", None, "could not parse"),
    "half a character": (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', None, "surrogates"),
    "nested deeply": (b"[" * 9000, None, "nested"),
    "no object": (b"[1]", None, "object"),
    "empty": (b"", None, "could not parse"),
    "no model": ({"messages": USER}, "model", "Missing required parameter"),
    "no messages": ({"model": "tiny"}, "messages", "Missing required parameter"),
    "no message": ({"model": "tiny", "messages": []}, "messages", "at least 1"),
    "unknown field": (CHAT | {"wizardry": 1}, "wizardry", "Unknown parameter"),
    "unknown field within": ({"model": "tiny", "messages": [USER[0] | {"x y": 1}]}, "messages[0].x y", "Unknown"),
    "wrong role": ({"model": "tiny", "messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'user'"),
    "no content": ({"model": "tiny", "messages": [{"role": "user"}]}, "messages[0]", "needs content"),
    "an image": (
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type", "'text'",
    ),
    "hot": (CHAT | {"temperature": 2.1}, "temperature", "less than or equal to 2"),
    "not a number": (CHAT | {"temperature": "1"}, "temperature", "number"),
    "no nucleus": (CHAT | {"top_p": 0}, "top_p", "greater than 0"),
    "no tokens": (CHAT | {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "too many choices": (CHAT | {"n": 17}, "n", "16"),
    "options without a stream": (CHAT | {"stream_options": {"include_usage": True}}, None, "stream"),
    "top without logprobs": (CHAT | {"top_logprobs": 2}, None, "logprobs"),
    "no token's bias": (CHAT | {"logit_bias": {"257": 1}}, "logit_bias", "below 257"),
    "no form": (CHAT | {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    "no schema": (
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema", "Missing",
    ),
    "a schema that nothing meets": (
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"type": "integer", "minimum": 7, "maximum": 3}}}},
        "response_format", "schema",
    ),
    "tools unknown to the template": (
        CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "knows no tools",
    ),
    "longer than the context": ({"model": "tiny", "messages": [{"role": "user", "content": "x" * 3000}]}, "messages",
                                "maximum context length is 3000"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong(name: str, running: Running) -> None:
    body, param, words = BAD[name]
    status, found = post(running, body)
    assert status == 400 and set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["param"] == param and words in found["error"]["message"], found
    assert found["error"]["type"] == "invalid_request_error"


def test_other_refusals_have_their_own_status(running: Running) -> None:
    assert post(running, b"[" + b"1," * 20_000)[0] == 413
    status, found = post(running, CHAT | {"model": "gpt-4"})
    assert status == 404 and found["error"]["code"] == "model_not_found"
    assert post(running, CHAT, "chat/nothing")[1]["error"]["message"] == "Invalid URL (POST /v1/chat/nothing)"
    assert post(running, {}, "models")[0] == 405
    for wrong in ("Bearer nothing", "", f"Basic {KEY}"):
        status, found = post(running, CHAT, authorization=wrong)
        assert status == 401 and found["error"]["code"] == "invalid_api_key"
    for empty in (
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [300]},
        {"prompt": 5},
        {"prompt": [["a"]]},
    ):
        status, found = post(running, {"model": "tiny"} | empty, "completions")
        assert status == 400 and found["error"]["param"].startswith("prompt")
    status, found = post(running, {"model": "tiny", "input": ["x"] * 300}, "embeddings")
    assert status == 400 and "at most 256 items" in found["error"]["message"]
    status, found = post(running, {"model": "tiny", "input": "x", "dimensions": 7}, "embeddings")
    assert status == 400 and found["error"]["param"] == "dimensions"
    with pytest.raises(openai.BadRequestError, match="context length"):
        running.client.completions.create(model="tiny", prompt="x" * 3001)
    assert running.service.engine.alive and not running.service.engine.running


def test_a_full_queue_and_a_slow_reader(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, one place in the queue: the third request is told to come back; a client that does not read holds up nobody."""
    engine, gate = running.service.engine, threading.Event()
    read = engine.decoder.read
    monkeypatch.setattr(engine.decoder, "read", lambda parts: gate.wait() and read(parts))
    options: Any = {"model": "tiny", "prompt": "x", "max_tokens": 60, "seed": 0, "logit_bias": {"256": -100}}
    slow = running.client.completions.create(**options, stream=True)  # reads nothing
    until(lambda: engine.running)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(running.client.completions.create, model="tiny", prompt="The", max_tokens=2)
        until(lambda: engine.waiting)
        status, found = post(running, {"model": "tiny", "prompt": "x"}, "completions")
        assert status == 429 and found["error"]["code"] == "rate_limit_exceeded"
        gate.set()
        assert second.result(timeout=60).choices[0].text
    assert len(list(slow)) > 5  # tokens that end no character come with the next


def test_a_client_that_leaves_within_its_body_is_no_error_of_the_server(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n" % KEY.encode())
        client.sendall(b"Content-Length: 100\r\n\r\n{")
    status, _ = post(running, {"model": "tiny", "prompt": []}, "completions")  # behind it
    assert status == 400 and not caplog.records


def test_time_is_bounded(model: Path) -> None:
    one = Running(model, key=None, limits=Limits(seconds=0.2), slots=1, context=4000)
    try:
        with pytest.raises(openai.InternalServerError, match=r"within 0.2 seconds"):
            one.client.completions.create(model="tiny", prompt="x", max_tokens=3900, logit_bias={"256": -100})
        until(lambda: not one.service.engine.running)
    finally:
        one.close()


@pytest.fixture(scope="module")
def process(model: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [
        sys.executable,
        "-m",
        "bitwright",
        "serve",
        str(model),
        "--port",
        "0",
        "--name",
        "tiny",
        "--context",
        "4000",
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}) as started:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line.startswith("tiny at http://127.0.0.1:"), line
        yield started, line.split()[2].rstrip(":")
        started.kill()


def test_sigterm_ends_what_has_begun_and_then_the_server(process: tuple["subprocess.Popen[str]", str]) -> None:
    started, url = process
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    options: Any = {"model": "tiny", "prompt": "x", "max_tokens": 150, "logit_bias": {"256": -100}, "temperature": 0}
    stream: Any = iter(client.completions.create(**options, stream=True))
    next(stream)
    started.send_signal(signal.SIGTERM)
    assert sum(len(chunk.choices[0].text) for chunk in stream) > 60  # to its end
    out, errors = started.communicate(timeout=30)
    assert started.returncode == 0 and not errors and not out
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    client.close()


def test_a_port_in_use_is_refused_before_the_model_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("bitwright.serve.service.Service.open")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = CliRunner().invoke(app, ["serve", str(model), "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 2 and "cannot listen" in done.stderr and "--port" in done.stderr
    done = CliRunner().invoke(app, ["serve", str(model), "--host", "192.0.2.1", "--port", "0"])
    assert done.exit_code == 2 and "cannot listen" in done.stderr
    done = CliRunner().invoke(app, ["serve", "nothing", "--port", "0"])
    assert done.exit_code == 2 and "no such file" in done.stderr


def test_two_servers_that_start_together_do_not_share_a_port() -> None:
    with bound("127.0.0.1", 0) as first, pytest.raises(InputError, match="cannot listen"):
        bound("127.0.0.1", first.getsockname()[1])


def test_without_the_extra_the_remedy_is_the_pip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bitwright.cli.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 2 and 'pip install "bitwright[serve]"' in done.stderr and "uvicorn" in done.stderr
