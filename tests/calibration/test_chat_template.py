"""A chat template that fails, or never ends, is a refusal wherever one is used."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bitwright.calibration import chat_template
from bitwright.calibration.chat_template import templated
from bitwright.calibration.general_text import _chats
from bitwright.cli.app import app
from bitwright.errors import InputError
from conftest import make_checkpoint

ASKED = [{"role": "user", "content": "hi"}]
NESTED = "{% for x in y %}" * 100 + "{% endfor %}" * 100
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("templates") / "source")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ 1 | nothing }}", "No filter named"),
        ("{% if messages is nothing %}{% endif %}", "No test named"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ cycler() }}", "at least one item"),
        ("{{ 'a' * (10 ** 13) }}", ""),
        ("{{ messages + 1 }}", "concatenate"),
        ("{{ messages[0].content.nothing() }}", "no attribute"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].nothing.more }}", "no attribute"),
        ("\udcff", "surrogates"),
        (NESTED, "too many"),
        (7, "Can't compile"),
        ({"rag": "{{ 1 }}"}, "none of the model's chat templates is the default one: rag"),
        (ENDLESS, "does not end"),
    ],
)
def test_what_a_template_raises_is_a_refusal(
    template: Any, says: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1 if template == ENDLESS else 30.0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says) as caught:
        templated(tokenizer, ASKED, where="here", remedy="another one")
    assert caught.value.remedy == "another one" and not _chats(tokenizer, 257)


def test_a_template_for_tools_alone(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"tool_use": "{{ tools[0].function.name }}"}
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    assert templated(tokenizer, ASKED, [tool], remedy="") == "add"
    with pytest.raises(InputError, match="default"):
        templated(tokenizer, ASKED, remedy="")


def test_generate_says_which_template_and_what_to_do(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").write_text("{% if %}")
    ran = CliRunner().invoke(app, ["generate", str(source), "--chat", "--prompt", "hi", "--json"])
    said = json.loads(ran.stdout)
    assert ran.exit_code == 2 and "refuses it" in said["error"] and "chat_template.jinja" in said["remedy"]


@pytest.mark.parametrize("given", [["--prompt", "a\udcffb"], ["--prompt", "-"]])
def test_a_prompt_of_bytes_that_are_no_text(given: list[str], source: Path) -> None:
    ran = CliRunner().invoke(app, ["generate", str(source), *given, "--json"], input=b"a\xffb")
    assert ran.exit_code == 2 and "no UTF-8" in json.loads(ran.stdout)["error"]
