"""How fast `bitwright serve` answers several clients, how soon the first token comes, and what its memory does.

    python -m bench.serve MODEL [--scheme int4-g64] [--clients 1,8] [--requests 200] [--peer llama-server --file FILE.gguf]
    python -m bench.serve FILE.gguf --peer "bench/peers/envs/xllamacpp/bin/python bench/peers/llama_server.py" --file FILE.gguf

Starts the server as a process and asks it through the openai client: tokens a second of so many clients at once, each writing
`--tokens` behind a prompt of its own (tokens that end an answer are biased away, so that all write as many); the median time to
the first token of one client behind a prompt of 32 tokens; resident memory before and after `--requests` requests. With --peer,
the same of llama.cpp's llama-server on a GGUF file.
"""

import argparse
import asyncio
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import openai

from bench.measure import BITWRIGHT, ENVIRONMENT, table
from bitwright.calibration.windows import load_tokenizer

SENTENCE = "the river keeps its bed although every drop of water in it is new and nobody saw the same one twice"


@contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
    """A server as a process, once it answers; its id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)}\nended with {process.returncode}\n{process.communicate()[1][-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def resident(pid: int) -> float:
    """MB of a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def prompt(i: int, words: int) -> str:
    """A prompt of its own for each i, so that no server finds it in its cache."""
    known = SENTENCE.split()
    return " ".join([str(i * 7919), *(known[(i + k) % len(known)] for k in range(words))])


async def written(
    client: openai.AsyncOpenAI, model: str, i: int, tokens: int, ends: Sequence[int] = ()
) -> tuple[int, float]:
    """Tokens of one answer, and seconds to its first. ends: tokens that it does not write."""
    begun, first, count = time.monotonic(), 0.0, 0
    options: Any = {"model": model, "prompt": prompt(i, 24), "max_tokens": tokens, "temperature": 0, "stream": True}
    bias: Any = {str(token): -100 for token in ends}
    stream = await client.completions.create(**options, logit_bias=bias, stream_options={"include_usage": True})
    async for chunk in stream:
        first = first or time.monotonic() - begun
        count = chunk.usage.completion_tokens if chunk.usage else count
    return count, first


async def measured(port: int, pid: int, args: argparse.Namespace) -> list[str]:
    """The figures of a running server: a cell each."""
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=3600, max_retries=20)
    model = (await client.models.list()).data[0].id
    await written(client, model, 0, 8)  # warm up
    cells, i = list[str](), 1
    for count in args.counts:
        begun = time.monotonic()
        found = await asyncio.gather(*(written(client, model, i + k, args.tokens, args.ends) for k in range(count)))
        cells.append(f"{sum(n for n, _ in found) / (time.monotonic() - begun):.1f}")
        i += count
    first = median([(await written(client, model, i + k, 2))[1] for k in range(9)])
    before = resident(pid)
    for begin in range(0, args.requests, 16):
        await asyncio.gather(*(written(client, model, 10_000 + begin + k, 4) for k in range(16)))
    return [*cells, f"{first * 1e3:.0f}", f"{before:.0f}", f"{resident(pid):.0f}"]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme")
    parser.add_argument("--kv")
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--peer", help="the command of llama-server")
    parser.add_argument("--file", type=Path, help="what it serves")
    args = parser.parse_args()
    args.ends = load_tokenizer(args.model).all_special_ids
    args.counts = [int(count) for count in args.clients.split(",")]
    most, port = str(max(args.counts)), free_port()
    ours = [*BITWRIGHT, "serve", str(args.model), "--port", str(port), "--parallel", most, "--context", "1024"]
    ours += [part for name in ("scheme", "kv") if (value := getattr(args, name)) for part in (f"--{name}", value)]
    with server(ours, port) as pid:
        rows = [["bitwright", *asyncio.run(measured(port, pid, args))]]
    if args.peer:
        port = free_port()
        theirs = [
            *shlex.split(args.peer),
            "-m",
            str(args.file),
            "--port",
            str(port),
            "-np",
            most,
            "-c",
            str(1024 * max(args.counts)),
        ]
        with server(theirs, port) as pid:
            rows.append(["llama-server", *asyncio.run(measured(port, pid, args))])
    head = [f"{count} clients, tok/s" for count in args.counts]
    print(table(["", *head, "first token, ms", "MB", f"MB after {args.requests} requests"], rows))


if __name__ == "__main__":
    main()
