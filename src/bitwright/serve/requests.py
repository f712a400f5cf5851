"""What clients may send: the fields of OpenAI's requests, checked; a field that nothing would use is refused."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from bitwright.serve.failures import RequestError

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_INPUTS = 256
FORMS = ("text", "json_object", "json_schema")  # of an answer

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Fields(BaseModel):
    """An object of a request: other fields than its own are refused, and numbers are not read from strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(Fields):
    """A piece of a message's content; images and sounds are not read."""

    type: Literal["text"]
    text: str


class Called(Fields):
    """A function that the model called: its name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Fields):
    """A call in an assistant's earlier message."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only messages of role 'assistant' have tool_calls")
        return self

    @property
    def text(self) -> str:
        """Its content as one string."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Function(Fields):
    """A function that the model may call. parameters: a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # calls are not held to the schema


class Tool(Fields):
    """A tool: always a function."""

    type: Literal["function"]
    function: Function


class Schema(Fields):
    """A JSON schema that the answer must satisfy."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class AnyText(Fields):
    """An answer without a form."""

    type: Literal["text"]


class JsonObject(Fields):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchema(Fields):
    """An answer that satisfies a JSON schema."""

    type: Literal["json_schema"]
    json_schema: Schema


class StreamOptions(Fields):
    """What is added to a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Drawing(Fields):
    """What chat and completions share. Temperature and top-p are 1 where they are not given, as OpenAI has them."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None  # who asks changes nothing

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "Drawing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is enabled")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, without empty ones."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Drawing):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: Annotated[AnyText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    metadata: dict[str, str] | None = None  # kept by OpenAI with what it stores; nothing is stored here
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is enabled")
        if self.tool_choice is not None and self.tools is None:
            raise ValueError("'tool_choice' is only allowed when 'tools' are specified")
        return self

    @property
    def most(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Drawing):
    """The body of /v1/completions."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt or several, always as a list."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class EmbeddingRequest(Fields):
    """The body of /v1/embeddings."""

    model: str
    input: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MOST_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        """One text or several, always as a list."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


Asked = TypeVar("Asked", bound=Fields)


def parsed(kind: type[Asked], body: Any) -> Asked:
    """A request from its JSON. RequestError 400 that names the field."""
    if not isinstance(body, dict):
        raise RequestError(400, "The body of the request must be a JSON object.")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _refusal(max(details, key=lambda one: (one["type"] == "too_long", len(one["loc"])))) from None


def _refusal(error: ErrorDetails) -> RequestError:
    """One of pydantic's findings as OpenAI says it."""
    place = _place(error)
    kind, given, allowed = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "extra_forbidden":
        return RequestError(400, f"Unknown parameter: '{place}'.", param=place, code="unknown_parameter")
    if kind == "missing":
        message = f"Missing required parameter: '{place}'."
        return RequestError(400, message, param=place, code="missing_required_parameter")
    if kind == "literal_error":
        message = f"Invalid value: {_shown(given)}. Supported values are: {allowed['expected']}."
        return RequestError(400, message, param=place, code="invalid_value")
    if kind == "value_error":
        return RequestError(
            400, f"Invalid '{place or 'request'}': {allowed['error']}.", param=place or None, code="invalid_value"
        )
    return RequestError(
        400, f"Invalid '{place}': {error['msg']}, but got {_shown(given)}.", param=place, code="invalid_value"
    )


def _place(error: ErrorDetails) -> str:
    """messages[0].role, from a path that also names the kinds that a union was tried as."""
    text, before = "", ""
    for i, step in enumerate(error["loc"]):
        if isinstance(step, int):
            text += f"[{step}]"
        elif before == "response_format" and step in FORMS:
            pass
        elif (step.isidentifier() and step != "str") or (
            error["type"] == "extra_forbidden" and i == len(error["loc"]) - 1
        ):
            text += f".{step}" if text else step
        before = str(step)
    return text


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
