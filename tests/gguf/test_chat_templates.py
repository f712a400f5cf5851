"""Chat templates on their way into GGUF files and out of them: Jinja, each with a name of its own, or a refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf.templates import check_files, check_form, check_names, template_keys

NESTED = "{% for x in y %}" * 100 + "{% endfor %}" * 100


def configured(folder: Path, template: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("{{ messages | nothing }}", "'default' is no Jinja: No filter named 'nothing'"),
        ({"default": "{{ 1 }}", "rag": "{{"}, "'rag' is no Jinja"),
        (NESTED, "nested too deeply"),
        ("{{" + "(" * 3000 + ")" * 3000 + "}}", "nested too deeply"),
        ("\udcff", "no UTF-8"),
        ("{% break %}", "outside loop"),
        (7, "'default' is no Jinja: not a text"),
        ({"default": 7}, "not a text"),
        ({3: "{{ 1 }}"}, "the name 3"),
    ],
)
def test_no_key_for_what_is_no_jinja(found: Any, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        template_keys(found, "here")


def test_transformers_own_tags_are_taken_however_they_are_spaced() -> None:
    text = "{%generation%}{{ 1 }}{%-  endgeneration  -%}{% generation %}2{% endgeneration %}"
    assert template_keys(text, "here") == {"tokenizer.chat_template": text}
    with pytest.raises(FormatError, match="endgeneration"):
        template_keys("{% generation %}", "here")


@pytest.mark.parametrize(
    "entry", ["{{ 1 }}", {"name": "default"}, {"template": "{{ 1 }}"}, {"name": 1, "template": "x"}]
)
def test_a_list_of_what_is_no_template(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a name and a template"):
        check_form(configured(tmp_path, [entry]))


def test_a_tokenizer_that_does_not_load_for_its_templates_says_so(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    config = json.loads((llama / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": [{"template": "x"}]}))
    with pytest.raises(FormatError, match="not a name and a template"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_damaged_says_so(llama: Path, tmp_path: Path) -> None:
    content = json.loads((llama / "tokenizer.json").read_text())
    del content["model"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((llama / "tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no usable tokenizer: Model missing"):
        load_tokenizer(tmp_path)


def test_two_templates_of_one_name(tmp_path: Path) -> None:
    twice = [{"name": "rag", "template": "1"}, {"name": "rag", "template": "2"}]
    with pytest.raises(FormatError, match="named 'rag'"):
        check_names(configured(tmp_path, twice))
    configured(tmp_path, None)
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (tmp_path / "chat_template.jinja").write_text("1")
    (more / "rag.jinja").write_text("2")
    check_names(tmp_path)
    (more / "default.jinja").write_text("3")
    with pytest.raises(FormatError, match="named 'default'") as caught:
        check_names(tmp_path)
    assert caught.value.where.endswith("default.jinja")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("../../evil", "x", "no file can be"),
        ("", "x", "no file can be"),
        ("a\0b", "x", "no file"),
        ("rag", "{{", "no Jinja"),
    ],
)
def test_what_of_a_gguf_file_no_directory_can_hold(name: str, text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        check_files({"default": "x", name: text}, "a.gguf")
    assert "gguf-new-metadata" in caught.value.remedy
    check_files({"default": "x", "tool_use": "y"}, "a.gguf")
    check_files("x", "a.gguf")
