"""Data sets in JSON as people have them: .jsonl with one entry a line, or .json with a list of entries.

An entry is a text or a conversation, in one of the forms that training tools read:

    {"text": "…"}
    {"messages": [{"role": "user", "content": "…"}, …]}              OpenAI, TRL; "tool_calls" may stand for content
    {"conversations": [{"from": "human", "value": "…"}, …]}          ShareGPT
    {"prompt": "…", "completion": "…"}                               TRL; or "response"; or lists of messages
    {"instruction": "…", "input": "…", "output": "…"}                Alpaca; or "context" and "response" (Dolly)
    {"question": "…", "answer": "…"}

The last three may have a "system" message. A conversation may have the "tools" that it could call, as OpenAI and TRL have them.
Other keys are ignored.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.calibration.chat_template import templated
from bitwright.calibration.text_mix import unreadable
from bitwright.errors import CalibrationError

Message = dict[str, Any]  # role and content
ENDINGS = (".jsonl", ".json")
LINE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
PAIRS = (  # keys of a question, of what it is about, and of its answer
    ("prompt", "", "completion"), ("prompt", "", "response"), ("instruction", "input", "output"),
    ("instruction", "context", "response"), ("question", "", "answer"),
)  # fmt: skip
SPEAKERS = {  # ShareGPT's names of roles
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """messages, in order; tools: descriptions of what the model could call, as chat templates read them."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()

    def until(self, end: int) -> "Conversation":
        """Its first messages."""
        return Conversation(self.messages[:end], self.tools)


def is_data_set(source: str) -> bool:
    """Whether a text's name is that of a file of JSON."""
    return source.lower().endswith(ENDINGS) and Path(source).is_file()


def read_file(source: str) -> str:
    """A text file. CalibrationError if it is missing, not text, or empty."""
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(source, error) from error
    if not text.strip():
        raise CalibrationError("the text is empty", where=source, remedy="give some thousand words of real text")
    return text


def entries(source: str) -> list[str | Conversation]:
    """The texts and conversations of a data set. CalibrationError as of `read_file`, or for an entry of another form."""
    return [_entry(value, where) for value, where in _values(read_file(source), source)]


def _values(text: str, source: str) -> Iterator[tuple[Any, str]]:
    """Each entry as plain data, and where it stands."""
    if source.lower().endswith(".jsonl"):
        lines = ((line, f"{source}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip())
        for line, where in lines:
            yield _parsed(line, where), where
        return
    found = _parsed(text, source)
    if not isinstance(found, list) or not found:
        remedy = "a list of texts or conversations; give it another ending than .json to read it as plain text"
        raise CalibrationError("not a list of entries", where=source, remedy=remedy)
    for number, value in enumerate(found, 1):
        yield value, f"{source}, entry {number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = f"write each line as {LINE}" if where.rpartition(", ")[0] else "mend it, or rename it to .txt"
        raise CalibrationError(f"not JSON: {error}", where=where, remedy=remedy) from error


def _entry(value: Any, where: str) -> str | Conversation:
    """A text, or the messages of a conversation."""
    unknown = CalibrationError("neither a text nor a conversation", where=where, remedy=f"write each entry as {LINE}")
    if not isinstance(value, dict):
        raise unknown
    for asked, about, answered in PAIRS:
        if asked in value and answered in value:
            return _checked(_pair(value, asked, about, answered), value, where)
    if "messages" in value:
        return _checked(value["messages"], value, where)
    if "conversations" in value:
        return _checked(_shared(value["conversations"]), value, where)
    if not isinstance(value.get("text"), str):
        raise unknown
    return str(value["text"])


def _pair(value: dict[str, Any], asked: str, about: str, answered: str) -> Any:
    """A question and its answer as messages; both may be messages already."""
    question, more, answer = value[asked], value.get(about), value[answered]
    begin = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    if isinstance(question, list) and isinstance(answer, list):
        return begin + question + answer
    if more and isinstance(question, str) and isinstance(more, str):
        question = f"{question}\n\n{more}"
    return [*begin, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _shared(turns: Any) -> Any:
    """ShareGPT's turns as messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in turns]


def _checked(messages: Any, entry: dict[str, Any], where: str) -> Conversation:
    """Messages with a role, and with text or calls of tools; and the entry's tools. CalibrationError for others."""
    remedy = f"write each entry as {LINE}"
    if messages == []:
        raise CalibrationError("no messages", where=where, remedy=remedy)
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise CalibrationError("not a conversation", where=where, remedy=remedy)
    said = [{**message, "content": _content(message), **_calls(message, where)} for message in messages]
    if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in said):
        raise CalibrationError("a role or content that is not text", where=where, remedy=remedy)
    return Conversation(said, _tools(entry.get("tools"), where))


def _content(message: Message) -> Any:
    """What a message says: parts of text are joined; a message that calls tools may say nothing."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    return content


def _calls(message: Message, where: str) -> dict[str, Any]:
    """A message's calls of tools, if it has any, as chat templates read them. CalibrationError for calls of no form."""
    if not message.get("tool_calls"):
        return {}
    try:
        return {"tool_calls": calls_for_templates(message["tool_calls"])}
    except (ValueError, TypeError, AttributeError) as error:
        remedy = '"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]'
        raise CalibrationError(f"unusable tool_calls: {error}", where=where, remedy=remedy) from error


def calls_for_templates(calls: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls of tools as chat templates read them: arguments a mapping, which in OpenAI's form is JSON in a string.

    ValueError for a string that is no JSON.
    """
    found = [dict(call) for call in calls]
    for call in found:
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"] or "{}")
        call.update({"function": function} if "function" in call else function)
    return found


def _tools(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools: a list, or one as JSON in a string (ShareGPT). CalibrationError for anything else."""
    if isinstance(given, str) and given.strip():
        given = _parsed(given, where)
    if given and not (isinstance(given, list) and all(isinstance(tool, dict) for tool in given)):
        remedy = '"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]'
        raise CalibrationError("tools that are no list of descriptions", where=where, remedy=remedy)
    return tuple(given or ())


def plain(source: str) -> str:
    """The texts of a data set, as one text. CalibrationError if it holds conversations."""
    found = entries(source)
    number = next((i for i, entry in enumerate(found, 1) if not isinstance(entry, str)), 0)
    if number:
        message = f"entry {number} is a conversation, where plain text is read"
        raise CalibrationError(message, where=source, remedy="--chat reads it in the model's chat template")
    return "\n\n".join(str(entry) for entry in found) + "\n"


def documents(tokenizer: Any, source: str) -> list[str]:
    """Each entry of a data set as text: conversations in the model's chat template. InputError if it has none."""
    return [
        f"{entry}\n\n"
        if isinstance(entry, str)
        else rendered(tokenizer, entry, f"{source}, conversation {number}") + "\n"
        for number, entry in enumerate(entries(source), 1)
    ]


def rendered(tokenizer: Any, conversation: Conversation, where: str, *, asking: bool = False) -> str:
    """A conversation in the chat template, special tokens as text; asking: and what the template asks for an answer with.

    InputError if there is no template, or it refuses the conversation.
    """
    remedy = "give plain text, or put the model's chat_template.jinja there"
    if tokenizer.chat_template:
        remedy = "give conversations as the model's chat_template.jinja knows them, or plain text"
    return templated(tokenizer, conversation.messages, conversation.tools, asking=asking, where=where, remedy=remedy)
