"""The commands that run a model: generate, chat, bench."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli.console import AsJson, check_model, console, errors, interruption, reporting, show

if TYPE_CHECKING:
    from bitwright.inference.generation import Message
    from bitwright.inference.sampling import Sampling

Model = Annotated[Path, typer.Argument(help="Directory, .gguf file or name on the hub, float or quantized.")]
Most = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token; above, the more the freer.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens that have this share of the mass.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Rounded = Annotated[
    str | None, typer.Option(help="Round a float checkpoint on the way into memory: int4-g128, nf4-g64-dq, ...")
]
Bits = Annotated[
    int, typer.Option(help="Bits of quantized layers' inputs: 16 (as good as float), or 8 (faster prompts).")
]
Context = Annotated[int, typer.Option("--context", "--room", min=2, help="Tokens of prompt and answer together.")]
KeysAndValues = Annotated[
    str | None,
    typer.Option(
        help="Keep keys and values in q8 (half the memory) or q4 (little more than a quarter); float otherwise."
    ),
]
Lookahead = Annotated[
    int,
    typer.Option(
        min=0, max=64, help="Tokens tried at a time where the text repeats itself: the same tokens, sooner. 0: none."
    ),
]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from; - reads it from stdin.")],
    max_tokens: Most = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message, by the chat template.")] = False,
    scheme: Rounded = None,
    activations: Bits = 16,
    context: Context = 4096,
    kv: KeysAndValues = None,
    lookahead: Lookahead = 0,
    as_json: AsJson = False,
) -> None:
    """Write on from a prompt; the text appears as it is made."""
    with reporting(as_json):
        check_model(model)
        sampling = _sampling(temperature, top_p, seed)
        from bitwright.inference.generation import Generator

        generator = Generator.open(
            model, scheme=scheme, activations=activations, context=context, kv=kv, lookahead=lookahead
        )
        text = _text_of(prompt)
        if chat:
            stream = generator.answer([{"role": "user", "content": text}], most=max_tokens, sampling=sampling)
        else:
            stream = generator.complete(text, most=max_tokens, sampling=sampling)
        written = _written(stream, quiet=as_json)
    if as_json:
        counts = {"prompt_tokens": stream.prompt_tokens, "completion_tokens": stream.completion_tokens}
        print(json.dumps({"prompt": text, "text": written, **counts, "finish_reason": stream.finish_reason}))


def chat(
    model: Model,
    max_tokens: Most = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    scheme: Rounded = None,
    activations: Bits = 16,
    context: Context = 4096,
    kv: KeysAndValues = None,
    lookahead: Lookahead = 0,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it, Ctrl-C ends an answer."""
    with reporting(False):
        check_model(model)
        sampling = _sampling(temperature, top_p, seed)
        from bitwright.inference.generation import Generator

        generator = Generator.open(
            model, scheme=scheme, activations=activations, context=context, kv=kv, lookahead=lookahead
        )
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for line in _lines():
            whole = [*messages, {"role": "user", "content": line}]
            messages = generator.recent(whole, room=max_tokens)
            if len(messages) < len(whole):
                errors.print(
                    f"[dim]the context of {generator.context} tokens is full: the oldest messages are forgotten[/]"
                )
            said = _written(generator.answer(messages, most=max_tokens, sampling=sampling), quiet=False)
            messages.append({"role": "assistant", "content": said})


def bench(
    model: Model,
    scheme: Rounded = None,
    activations: Bits = 16,
    kv: KeysAndValues = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens after it.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, of which the medians count.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Tokens a second for a prompt and after it, and how far that is from what the memory allows."""
    with reporting(as_json):
        check_model(model)
        from bitwright.inference.speed import measure

        found = measure(
            model, scheme=scheme, activations=activations, kv=kv, prompt=prompt, decode=decode, repeat=repeat
        )
        show(found.as_dict(), as_json, "Speed")


def _sampling(temperature: float, top_p: float, seed: int) -> "Sampling":
    from bitwright.inference.sampling import Sampling

    return Sampling(temperature, top_p, seed)


def _text_of(prompt: str) -> str:
    """The prompt; "-": what stands on standard input. InputError for bytes that are no UTF-8."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        prompt.encode()  # bytes that were no text came as halves of pairs
        return prompt
    except UnicodeError as error:
        from bitwright.errors import InputError

        raise InputError(f"the prompt is no UTF-8: {error}", remedy="write it in UTF-8: iconv -t UTF-8") from error


def _lines() -> Iterator[str]:
    """The lines that the user types, up to an empty one or Ctrl-D."""
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def _written(stream: Iterator[str], *, quiet: bool) -> str:
    """Print pieces of text as they come, until they end or the user interrupts; the text printed."""
    parts = []
    try:
        for part in stream:
            interruption.check()
            parts.append(part)
            if not quiet:
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        interruption.seen = False  # a chat goes on
        errors.print("[dim]interrupted[/]")
    if not quiet:
        print(flush=True)
    return "".join(parts)
