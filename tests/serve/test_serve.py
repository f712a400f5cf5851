"""The server as the openai client finds it, streamed and not; beside `bitwright generate`'s own answers."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

from bitwright.inference.generation import Generator
from bitwright.inference.sampling import Sampling
from bitwright.serve.engine import Task
from conftest import make_checkpoint
from serve.running import KEY, Running, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("m") / "m", num_hidden_layers=2, max_position_embeddings=256)


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    one = Running(model, slots=4, scheme="int8-g32", context=200)
    yield one
    one.close()


@pytest.fixture(scope="module")
def own(model: Path) -> Generator:
    """The same model without a server."""
    return Generator.open(model, scheme="int8-g32", context=200)


def said(own: Generator, prompt: str, most: int, **sampling: Any) -> str:
    return "".join(own.complete(prompt, most=most, sampling=Sampling(**sampling)))


def test_completions_are_those_of_generate(running: Running, own: Generator) -> None:
    make = running.client.completions.create
    whole = make(model="tiny", prompt="The quick", max_tokens=12, temperature=0)
    assert whole.choices[0].text == said(own, "The quick", 12) and whole.choices[0].finish_reason == "length"
    assert whole.usage and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 12)
    chunks = list(make(model="tiny", prompt="The quick", max_tokens=12, temperature=0, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) > 3
    drawn = make(model="tiny", prompt="The quick", max_tokens=12, temperature=0.9, top_p=0.8, seed=5)
    assert drawn.choices[0].text == said(own, "The quick", 12, temperature=0.9, top_p=0.8, seed=5)
    several = make(model="tiny", prompt=["The", "A fox"], n=2, max_tokens=5, temperature=1, seed=1)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.choices[3].text == said(own, "A fox", 5, temperature=1, seed=2)
    assert several.usage and several.usage.prompt_tokens == 3 + 5 and several.usage.completion_tokens == 20
    by_ids = make(model="tiny", prompt=own.tokenizer.encode("The quick"), max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == whole.choices[0].text


def test_chat_by_the_template_streamed_and_not(running: Running, own: Generator) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be "},
        {"role": "user", "content": [{"type": "text", "text": "br"}, {"type": "text", "text": "ief."}]},
    ]
    whole = running.client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0
    )
    assert whole.choices[0].message.content == said(own, "Be brief.", 9)
    stream = running.client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=9,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 9
    assert len({c.id for c in chunks}) == 1


def test_stop_strings_end_a_text_before_them(running: Running, own: Generator) -> None:
    text = said(own, "The quick", 30)
    stop = text[7:10]
    for streamed in (False, True):
        got: Any = running.client.completions.create(
            model="tiny",
            prompt="The quick",
            max_tokens=30,
            temperature=0,
            stop=["never", stop],
            stream=streamed,
            logprobs=0,
        )
        found = "".join(c.choices[0].text for c in got) if streamed else got.choices[0].text
        assert found == text[: text.index(stop)]
    until(lambda: not running.busy())


def test_log_probabilities_are_the_models_own(running: Running, own: Generator) -> None:
    import torch

    ids = torch.tensor([own.tokenizer.encode("The quick")])
    with torch.no_grad():
        expected = own.model(ids).logits[0, -1].log_softmax(-1)
    got = running.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "The quick"}], max_tokens=3, logprobs=True, top_logprobs=4,
        temperature=2, seed=3,
    )  # fmt: skip
    content = got.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 3 and [len(t.top_logprobs) for t in content] == [4] * 3
    best = expected.topk(4)
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=5e-3)
    texts = [own.tokenizer.decode([i]) for i in range(257)]
    assert content[0].logprob == pytest.approx(float(expected[texts.index(content[0].token)]), abs=5e-3)
    old = running.client.completions.create(model="tiny", prompt="The quick", max_tokens=3, logprobs=2, temperature=0)
    likely = old.choices[0].logprobs
    assert likely and likely.token_logprobs and likely.text_offset and likely.top_logprobs
    assert likely.token_logprobs[0] == pytest.approx(float(expected.max()), abs=5e-3) and likely.text_offset[0] == 0


def test_sixteen_clients_at_once_get_their_own_answers(running: Running, own: Generator) -> None:
    prompts = [f"{i} the quick brown fox {i * i}" for i in range(16)]
    expected = [said(own, prompt, 20) for prompt in prompts]

    def ask(i: int) -> str:
        options: Any = {"model": "tiny", "prompt": prompts[i], "max_tokens": 20, "temperature": 0}
        if i % 2:
            return "".join(c.choices[0].text for c in running.client.completions.create(**options, stream=True))
        return running.client.completions.create(**options).choices[0].text

    engine = running.service.engine
    before = engine.counts.steps

    def held_up() -> Tensor:  # until all have asked, however slow the machine
        until(lambda: len(engine.waiting) == 16)
        return torch.zeros(0)

    engine.add_task(Task(held_up, lambda _: None, time.monotonic() + 60))
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == expected
    assert engine.counts.steps - before < 16 * 20 / 2, "they did not share readings of the weights"


def test_a_prompt_goes_on_from_what_was_read(running: Running, own: Generator) -> None:
    first = "Once upon a time there was a small model. " * 2
    cached = []
    for prompt in (first + "It", first + "It slept", first + "He"):
        got = running.client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
        assert got.choices[0].text == said(own, prompt, 4)
        assert got.usage and got.usage.prompt_tokens_details
        cached.append(got.usage.prompt_tokens_details.cached_tokens)
    assert cached[1] >= len(first) + 2 and cached[2] == len(first)


def test_a_json_schema_is_kept(running: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    ask: Any = running.client.chat.completions.create
    for seed in range(2):
        got = ask(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=150, temperature=1, seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        )  # fmt: skip
        found = json.loads(got.choices[0].message.content)
        assert set(found) == {"age", "ok"} and 0 <= found["age"] <= 99 and got.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(
            model="tiny", messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "wizard"}}},
        )  # fmt: skip


def test_a_bias_and_penalties_change_what_is_likely(running: Running, own: Generator) -> None:
    make = running.client.completions.create
    assert make(model="tiny", prompt="x", max_tokens=3, temperature=0, logit_bias={"65": 100}).choices[0].text == (
        own.tokenizer.decode([65] * 3)
    )
    got = make(model="tiny", prompt="x", max_tokens=5, temperature=0, logit_bias={"65": 50}, presence_penalty=2)
    assert got.choices[0].text == own.tokenizer.decode([65] * 5)  # 2 is little
    free = make(model="tiny", prompt="x", max_tokens=40, temperature=0, frequency_penalty=2).choices[0].text
    assert len(set(free)) > len(set(said(own, "x", 40)))


def test_tools_reach_the_template_and_calls_come_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The template shows them to the model; what it is made to write is read as a call, streamed and not."""
    template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m['content'] }}{% endfor %}{# <tool_call> #}"
    )
    monkeypatch.setattr(running.service.tokenizer, "chat_template", template)
    wrote = 'Wait.<tool_call>{"name": "age", "arguments": {"who": "you"}}</tool_call>'
    monkeypatch.setattr(running.service.engine, "decode", lambda ids: wrote[: 10 * len(ids)])
    tools: Any = [{"type": "function", "function": {"name": "age", "parameters": {"type": "object"}}}]
    ask: Any = running.client.chat.completions.create
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 8,
        "logit_bias": {"256": -100},
    }
    whole = ask(**options, tools=tools)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls" and message.content == "Wait."
    assert message.tool_calls[0].function.name == "age" and json.loads(message.tool_calls[0].function.arguments) == {
        "who": "you"
    }
    deltas = [chunk.choices[0].delta for chunk in ask(**options, tools=tools, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Wait."
    assert [delta.tool_calls[0].function.name for delta in deltas if delta.tool_calls] == ["age"]
    without = ask(**options, tools=tools, tool_choice="none")
    assert without.choices[0].message.content == wrote and whole.usage.prompt_tokens > without.usage.prompt_tokens + 50
    call = {"id": "c", "type": "function", "function": {"name": "age", "arguments": '{"who": "you"}'}}
    told: Any = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "7"}]
    assert ask(**options | {"messages": [*options["messages"], *told]}, tools=tools).choices[0].message


def test_embeddings_are_mean_hidden_states(running: Running, own: Generator) -> None:
    import torch

    got = running.client.embeddings.create(model="tiny", input=["The fox", "jumps"])
    with torch.no_grad():
        hidden = own.model.model(torch.tensor([own.tokenizer.encode("jumps")])).last_hidden_state[0].mean(0)
    expected = torch.nn.functional.normalize(hidden, dim=0)
    assert torch.allclose(torch.tensor(got.data[1].embedding), expected, atol=1e-3) and got.usage.prompt_tokens == 12
    plain = running.client.embeddings.create(model="tiny", input="jumps", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(got.data[1].embedding, abs=1e-5)


def test_models_health_and_metrics(running: Running) -> None:
    assert [one.id for one in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").owned_by == "bitwright"
    with openai.DefaultHttpxClient(base_url=running.url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        text = http.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["bitwright_written_tokens_total"]) > 100 and float(figures["bitwright_slots"]) == 4
    assert float(figures['bitwright_requests_total{path="/v1/completions",status="200"}']) > 5
    assert float(figures["bitwright_first_token_seconds_count"]) > 5


def test_a_client_that_leaves_frees_its_slot(running: Running) -> None:
    """Streaming, and waiting for a whole answer."""

    async def leave(streamed: bool) -> None:
        client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        options: Any = {"model": "tiny", "prompt": "x", "max_tokens": 150, "logit_bias": {"256": -100}}
        task = asyncio.create_task(client.completions.create(**options, stream=streamed))
        if streamed:
            stream: Any = await task
            await stream.__anext__()
            await stream.close()
        else:
            while not running.busy():
                await asyncio.sleep(0.001)
            task.cancel()
        await client.close()

    for streamed in (True, False):
        before = running.service.engine.counts.written
        asyncio.run(leave(streamed))
        until(lambda: not running.busy())
        assert running.service.engine.counts.written - before < 149
