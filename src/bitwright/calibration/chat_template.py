"""A conversation in the tokenizer's chat template (Jinja), as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from bitwright.errors import InputError
from bitwright.gguf.templates import DEFAULT
from bitwright.system.time_limit import within

SECONDS = 30.0  # a template takes milliseconds
TOOLS = "tool_use"  # the template that transformers takes where there are tools
# What a template's own code may raise, whatever is in it.
FAILURES = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, SyntaxError,
    MemoryError,
)  # fmt: skip


def templated(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    asking: bool = False,
    where: str = "",
    remedy: str,
) -> str:
    """The conversation as text, special tokens too; asking: and what the template asks for an answer with.

    where, remedy: for the InputError if there is no template, or it refuses the conversation, fails, or does not end.
    """
    found = tokenizer.chat_template
    if not found:
        raise InputError("the model has no chat template", where=where, remedy=remedy)
    if isinstance(found, Mapping) and DEFAULT not in found and not (tools and TOOLS in found):
        message = f"none of the model's chat templates is the default one: {', '.join(map(str, found))}"
        raise InputError(message, where=where, remedy=remedy)
    try:
        given = {"tools": list(tools) if tools else None, "tokenize": False, "add_generation_prompt": asking}
        text = str(within(SECONDS, lambda: tokenizer.apply_chat_template(list(messages), **given)))
        text.encode()  # bytes that are no UTF-8 make no tokens
        return text
    except TimeoutError as error:
        message = f"the chat template does not end: not in {SECONDS:.0f} seconds"
        raise InputError(message, where=where, remedy=remedy) from error
    except FAILURES as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the chat template refuses it: {reason}", where=where, remedy=remedy) from error
