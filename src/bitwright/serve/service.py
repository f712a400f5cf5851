"""Service: a loaded model, its engine, and requests turned into jobs."""

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.data_sets import calls_for_templates
from bitwright.errors import InputError
from bitwright.inference.generation import Generator, conversation
from bitwright.inference.sampling import Sampling
from bitwright.serve.engine import Engine
from bitwright.serve.failures import RequestError, too_long
from bitwright.serve.grammar import ANY_OBJECT, Grammar, Grammars
from bitwright.serve.job import Event, Job, Penalties
from bitwright.serve.requests import ChatRequest, CompletionRequest, Drawing, JsonSchema, Message


@dataclass(frozen=True)
class Limits:
    """What one client can take.

    queue    requests that may wait for a slot
    seconds  from a request to the end of its answer
    body     bytes of a request
    """

    queue: int = 64
    seconds: float = 600.0
    body: int = 8 << 20


class Service:
    """A model that answers. name: what clients call it; deliver, of its methods: who is told of a choice's events, by index."""

    def __init__(self, generator: Generator, name: str, limits: Limits) -> None:
        self.generator, self.name, self.limits, self.begun = generator, name, limits, int(time.time())
        self.tokenizer, self.vocabulary = generator.tokenizer, generator.model.config.vocab_size
        self._encoding = threading.Lock()
        stop = generator.stop()
        self.grammars = Grammars(generator.tokenizer, self.vocabulary, stop)
        self.engine = Engine(
            generator.decoder,
            decode=lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            stop=stop,
            most=limits.queue,
            seconds=limits.seconds,
            lookahead=generator.lookahead,
        )

    @classmethod
    def open(cls, path: Path, *, name: str | None = None, limits: Limits | None = None, **options: Any) -> "Service":
        """Load a checkpoint; options: those of `Generator.open`, which says what is raised."""
        return cls(
            Generator.open(path, **options), name or path.resolve().name.removesuffix(".gguf"), limits or Limits()
        )

    def text_of(self, token: int) -> str:
        """A token's own text."""
        return str(self.tokenizer.decode([token]))

    def check_model(self, name: str) -> None:
        """RequestError 404 for another model than this."""
        if name != self.name:
            message = f"The model `{name}` does not exist; this server has `{self.name}`."
            raise RequestError(404, message, param="model", code="model_not_found")

    def chat_jobs(self, asked: ChatRequest, deliver: Callable[[int, Event], None]) -> list[Job]:
        """The jobs of a conversation: one a choice. RequestError 400 for what the model or its chat template cannot take."""
        if not self.tokenizer.chat_template:
            message = f"The model `{self.name}` has no chat template; use /v1/completions."
            raise RequestError(400, message, param="messages")
        tools = (
            None
            if asked.tools is None or asked.tool_choice == "none"
            else [t.model_dump(exclude_none=True) for t in asked.tools]
        )
        if tools and "tools" not in str(self.tokenizer.chat_template):
            raise RequestError(400, f"The chat template of `{self.name}` knows no tools.", param="tools")
        messages = [_as_templates_have_it(message, i) for i, message in enumerate(asked.messages)]
        try:
            with self._encoding:
                ids = conversation(self.tokenizer, messages, tools)
        except InputError as error:
            raise RequestError(400, f"These messages make no prompt: {error.message}", param="messages") from error
        likeliest = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._jobs(
            [self._known(ids, "messages")], asked, asked.most, likeliest, self._grammar(asked), "messages", deliver
        )

    def completion_jobs(self, asked: CompletionRequest, deliver: Callable[[int, Event], None]) -> list[Job]:
        """The jobs of texts to go on from: n a prompt, prompt after prompt. RequestError 400 as above."""
        prompts = self.encoded(asked.prompts, "prompt")
        return self._jobs(prompts, asked, asked.max_tokens, asked.logprobs, None, "prompt", deliver)

    def encoded(self, texts: list[str] | list[list[int]], param: str) -> list[list[int]]:
        """Texts or token ids as token ids. RequestError 400 for none at all, or tokens that the model does not have."""
        with self._encoding:
            found = [self.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        return [self._known(ids, param) for ids in found]

    def _known(self, ids: list[int], param: str) -> list[int]:
        """The tokens. RequestError 400 for none at all, or some that the model does not have."""
        if not ids:
            raise RequestError(400, f"'{param}' is empty: it must have at least one token.", param=param)
        if max(ids) >= self.vocabulary:
            raise RequestError(400, f"'{param}' has token {max(ids)}; the model has {self.vocabulary}.", param=param)
        return ids

    def embedding(self, ids: list[int]) -> Tensor:
        """The mean of a text's last hidden states, of length 1: [H]."""
        with torch.no_grad():
            hidden = self.generator.model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].float().mean(0), dim=0)

    def check_length(self, ids: list[int], param: str) -> None:
        """RequestError 400 for a text that leaves no room for a token behind it."""
        if len(ids) >= self.generator.context:
            raise too_long(len(ids), self.generator.context, param)

    def _grammar(self, asked: ChatRequest) -> Grammar | None:
        form = asked.response_format
        if form is None or form.type == "text":
            return None
        if not isinstance(form, JsonSchema):
            return self.grammars.of(ANY_OBJECT)
        return self.grammars.of(json.dumps(form.json_schema.schema_))

    def _jobs(
        self,
        prompts: list[list[int]],
        asked: Drawing,
        most: int | None,
        likeliest: int | None,
        grammar: Grammar | None,
        param: str,
        deliver: Callable[[int, Event], None],
    ) -> list[Job]:
        for ids in prompts:
            self.check_length(ids, param)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        penalties, deadline = self._penalties(asked), time.monotonic() + self.limits.seconds
        temperature = 1.0 if asked.temperature is None else asked.temperature
        jobs = []
        for index in range(len(prompts) * asked.n):
            ids = prompts[index // asked.n]
            space = self.generator.context - len(ids)
            job = Job(
                prompt=ids,
                most=space if most is None else min(most, space),
                sampling=Sampling(temperature, asked.top_p or 1.0, seed + index % asked.n),
                deliver=partial(deliver, index),
                deadline=deadline,
                stops=asked.stops,
                logprobs=likeliest,
                grammar=grammar and grammar.fresh(),
                penalties=penalties,
            )
            jobs.append(job)
        return jobs

    def _penalties(self, asked: Drawing) -> Penalties:
        given = asked.logit_bias or {}
        for token in given:
            if not token.isdecimal() or int(token) >= self.vocabulary:
                message = f"Invalid key in 'logit_bias': {token}. Keys are token ids below {self.vocabulary}."
                raise RequestError(400, message, param="logit_bias", code="invalid_value")
        bias = tuple((int(token), more) for token, more in given.items())
        return Penalties(bias, asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0)


def _as_templates_have_it(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates read one: content a string, arguments of calls a mapping; a developer is the system."""
    shown: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    shown |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        try:
            shown["tool_calls"] = calls_for_templates([call.model_dump() for call in message.tool_calls])
        except ValueError as error:
            place = f"messages[{index}].tool_calls"
            said = f"Invalid '{place}': arguments are no JSON."
            raise RequestError(400, said, param=place, code="invalid_value") from error
    return shown
