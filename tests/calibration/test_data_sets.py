"""Data sets in JSON: every form that training tools read, and files of no form."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bitwright.calibration.data_sets import Conversation, documents, entries, is_data_set
from bitwright.calibration.windows import draw, read_text
from bitwright.errors import CalibrationError, InputError
from bitwright.evaluation.chat_text import conversations
from bitwright.train.data import IGNORED, training_data

ASKED, ANSWERED = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}"
    "[{{ c['function']['name'] }}]{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(llama: Path, template: str | None = TEMPLATE) -> Any:
    found = AutoTokenizer.from_pretrained(llama)
    found.chat_template = template
    return found


def lines(folder: Path, *values: Any) -> str:
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, values)) + "\n")
    return str(file)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"messages": [ASKED, ANSWERED], "id": 1}, [ASKED, ANSWERED]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Add 1 "}, {"text": "and 2."}]}]}, [ASKED]),
        ({"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "3"}]}, [ASKED, ANSWERED]),
        ({"conversations": [ASKED, ANSWERED]}, [ASKED, ANSWERED]),
        ({"prompt": "Add 1 and 2.", "completion": "3"}, [ASKED, ANSWERED]),
        ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, [SYSTEM, ASKED, ANSWERED]),
        ({"instruction": "Add 1 and 2.", "input": "", "output": "3", "system": "Be brief."}, [SYSTEM, ASKED, ANSWERED]),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, [{"role": "user", "content": "Add\n\n1, 2"}, ANSWERED]),
        ({"instruction": "Add", "context": "1, 2", "response": "3"}, [{"role": "user", "content": "Add\n\n1, 2"}, ANSWERED]),
        ({"question": "Add 1 and 2.", "answer": "3"}, [ASKED, ANSWERED]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_forms_of_conversations(entry: dict[str, Any], expected: list[Any], ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{ending}"
    file.write_text(json.dumps(entry) if ending == "jsonl" else json.dumps([entry], indent=1))
    assert entries(str(file)) == conversations(str(file)) == [Conversation(expected)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [ASKED, ANSWERED]}) + "\n", encoding="utf-8-sig")
    assert entries(str(tmp_path / "data.jsonl")) == [Conversation([ASKED, ANSWERED])]
    (tmp_path / "text.txt").write_text("Once.", encoding="utf-8-sig")
    assert read_text(str(tmp_path / "text.txt")) == "Once."


def test_texts_are_read_as_text_and_never_as_json(llama: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, *({"text": f"The {n}th story of the fox and the hound."} for n in range(300)))
    assert "text" not in read_text(file) and "{" not in read_text(file)
    words = tokenizer(llama, None)
    for calib in (file, f"{file}:0.5,general:0.5"):
        drawn = draw(words, calib, samples=4, seqlen=32, vocabulary=257, seed=0)
        assert "{" not in words.decode(drawn.seen[0]) and len(drawn.seen) == 4
    data = training_data(words, file, seqlen=32, vocabulary=257, windows=4, seed=0, where="model")
    assert bool((data.seen.labels != IGNORED).all())


def test_conversations_are_calibrated_on_in_the_chat_template(llama: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, *({"question": f"Who is number {n}?", "answer": "I am not."} for n in range(300)))
    words = tokenizer(llama)
    drawn = draw(words, file, samples=4, seqlen=64, vocabulary=257, seed=0)
    assert all("<assistant>I am not." in words.decode(window) for window in drawn.seen)
    with pytest.raises(InputError, match="no chat template"):
        draw(tokenizer(llama, None), file, samples=4, seqlen=64, vocabulary=257, seed=0)
    with pytest.raises(CalibrationError, match="entry 1 is a conversation") as caught:
        read_text(file)
    assert "--chat" in caught.value.remedy


def test_calls_of_tools_are_learned(llama: Path, tmp_path: Path) -> None:
    result = {"role": "tool", "content": "3"}
    file = lines(tmp_path, *([{"messages": [ASKED, CALL, result, ANSWERED]}] * 4))
    assert documents(tokenizer(llama), file)[0] == "<user>Add 1 and 2.<assistant>[add]<tool>3<assistant>3\n"
    data = training_data(tokenizer(llama), file, seqlen=96, vocabulary=257, windows=4, seed=0, where="model")
    counted = data.seen.labels[0][data.seen.labels[0] != IGNORED]
    assert tokenizer(llama).decode(counted) == "[add]3"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}
TOOLS = "{% for t in tools or [] %}({{ t['function'] | tojson }}){% endfor %}"
CALLS = (
    "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
    "[{{ c['function']['arguments'] | tojson }}]{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_arguments_of_calls_reach_the_template_as_it_reads_them(
    arguments: Any, tools: Any, llama: Path, tmp_path: Path
) -> None:
    call = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}]}
    file = lines(tmp_path, {"messages": [ASKED, call], "tools": tools})
    assert documents(tokenizer(llama, CALLS), file) == ['[{"a": 1}]\n']
    assert documents(tokenizer(llama, TOOLS), file) == [f"({json.dumps(TOOL['function'])})\n"]


def test_answers_without_weight_are_not_learned(llama: Path, tmp_path: Path) -> None:
    wrong = {"role": "assistant", "content": "4", "weight": 0}
    file = lines(tmp_path, *([{"messages": [ASKED, wrong, ASKED, {**ANSWERED, "weight": 1}]}] * 4))
    data = training_data(tokenizer(llama), file, seqlen=96, vocabulary=257, windows=4, seed=0, where="model")
    assert tokenizer(llama).decode(data.seen.labels[0][data.seen.labels[0] != IGNORED]) == "3"


@pytest.mark.parametrize(
    ("content", "says", "where"),
    [
        ('{"text": "a"}', "not a list", "data.json"),
        ("[]", "not a list", "data.json"),
        ('["a"]', "neither a text", "data.json, entry 1"),
        ('[{"text": "a"}', "not JSON", "data.json"),
        ("[" * 100_000, "not JSON", "data.json"),
        ('[{"prompt": "a", "completion": 3}]', "not text", "data.json, entry 1"),
        ('[{"conversations": "a"}]', "not a conversation", "data.json, entry 1"),
        ('[{"messages": [{"role": "user", "content": [1]}]}]', "not text", "data.json, entry 1"),
        ('[{"question": "a", "answer": "b", "tools": {"add": 1}}]', "no list", "data.json, entry 1"),
        ('[{"messages": [{"role": "user", "tool_calls": [1]}]}]', "tool_calls", "data.json, entry 1"),
        ('[{"messages": [{"role": "user", "tool_calls": [{"arguments": "{"}]}]}]', "tool_calls", "data.json, entry 1"),
    ],
)
def test_files_of_no_form(content: str, says: str, where: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=says) as caught:
        read_text(str(file))
    assert caught.value.where == str(tmp_path / where) and caught.value.remedy


def test_texts_among_conversations_are_named(llama: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, {"messages": [ASKED, ANSWERED]}, {"text": "Once upon a time."})
    with pytest.raises(CalibrationError, match="entry 2 is a text"):
        training_data(tokenizer(llama), file, seqlen=32, vocabulary=257, windows=4, seed=0, where="model")
    assert not is_data_set(str(tmp_path / "missing.jsonl")) and not is_data_set("general")
