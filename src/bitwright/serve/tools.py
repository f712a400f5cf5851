"""Tool calls in what a model writes: the calls that chat templates teach, read back as OpenAI's API gives them."""

import json
import re
import secrets
from typing import Any

from bitwright.serve.stops import StopFilter

TAG, END_TAG = "<tool_call>", "</tool_call>"  # Hermes, Qwen, SmolLM
BARE = (
    "python_tag",
    "[TOOL_CALLS]",
    '"parameters"',
)  # in templates of Llama 3 and Mistral: JSON without visible tags around it


class CallReader:
    """Text comes in; what is no call goes out at once, calls are read at the end.

    template: the chat template, by which the form of calls is known; of a form that is not known, all text goes out.
    """

    def __init__(self, template: str) -> None:
        self.tagged = TAG in template
        self.bare = not self.tagged and any(word in template for word in BARE)
        self.held, self.begun = "", False
        self.filter = StopFilter((TAG,) if self.tagged else ())

    def push(self, text: str) -> str:
        """Add text; what of it is surely no call."""
        if self.begun or (self.bare and not self.held and text.lstrip()[:1] in ("{", "[")):
            self.begun = True
            self.held += text
            return ""
        self.bare = self.bare and not text.strip()  # an answer that begins otherwise is none
        if not self.tagged:
            return text
        piece = self.filter.push(text)
        if self.filter.done:
            self.begun, self.held = True, self.filter.held
        return piece.text if piece else ""

    def rest(self) -> tuple[str, list[dict[str, Any]]]:
        """At the end: text that was held back and is no call, and the calls."""
        if not self.begun:
            left = self.filter.rest()
            return (left.text if left else ""), []
        written = self.held.split(TAG)[1:] if self.tagged else [self.held]
        calls = [call for text in written for call in _calls(text.split(END_TAG)[0])]
        return ("", calls) if calls else (self.held, [])


def _calls(text: str) -> list[dict[str, Any]]:
    """The calls in a piece of JSON, one or a list; none if it is anything else."""
    try:
        found = json.loads(re.sub(r"^\s*```(?:json)?|```\s*$", "", text).strip())
    except ValueError:
        return []
    calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None]


def _call(found: Any) -> dict[str, Any] | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": found["name"], "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
