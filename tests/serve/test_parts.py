"""The server's parts without a server: stop strings, calls of tools, and the engine's turns on a decoder that only counts."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.sampling import Sampling
from bitwright.serve.engine import WORTH_WAITING, Engine
from bitwright.serve.failures import RequestError
from bitwright.serve.job import End, Event, Job, Likely, Penalties, Piece
from bitwright.serve.stops import StopFilter
from bitwright.serve.tools import CallReader

TAGGED = '{%- if tools %}<tool_call>\n{"name": ...}\n</tool_call>{% endif %}'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
def test_stop_strings_are_found_across_pieces(size: int) -> None:
    text, out = "one two thr three four", StopFilter(["three", "fourteen"])
    passed: list[Piece | None] = []
    for i in range(0, len(text), size):
        if not out.done:
            passed.append(out.push(text[i : i + size], Likely(i, 0.0)))
    found = [piece for piece in passed if piece]
    assert out.done and "".join(piece.text for piece in found) == "one two thr "
    ids = [token.id for piece in found for token in piece.tokens]
    assert ids == [i for i in range(0, len(text), size) if i < 12]


def test_what_only_looks_like_a_stop_goes_out_in_the_end() -> None:
    out = StopFilter(["END"])
    assert out.push("an E", Likely(0, 0.0)) == Piece("an ", (Likely(0, 0.0),)) and out.push("", Likely(1, 0.0)) is None
    assert out.push("N", Likely(2, 0.0)) is None
    assert out.rest() == Piece("EN", (Likely(1, 0.0), Likely(2, 0.0))) and not out.done


@pytest.mark.parametrize(
    ("template", "written", "content", "names"),
    [
        (TAGGED, 'I look.<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "I look.", ["f"]),
        (TAGGED, '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>', "", ["f", "g"]),
        (TAGGED, '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g"}]</tool_call>', "", ["f", "g"]),
        (TAGGED, "<tool_call>nothing", "<tool_call>nothing", []),
        (TAGGED, "a < b <tool", "a < b <tool", []),
        ("python_tag", '{"name": "f", "parameters": {"x": 1}}', "", ["f"]),
        ("python_tag", '{"colour": "blue"}', '{"colour": "blue"}', []),
        ("python_tag", 'It is {"name": "f"}', 'It is {"name": "f"}', []),
        ("[TOOL_CALLS]", ' [{"name": "f", "arguments": {}}]', " ", ["f"]),
        ("nothing known", '<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
    ],
)
def test_calls_are_read_in_the_form_of_the_template(
    template: str, written: str, content: str, names: list[str]
) -> None:
    for size in (1, 5, 99):
        reader = CallReader(template)
        out = "".join(reader.push(written[i : i + size]) for i in range(0, len(written), size))
        left, calls = reader.rest()
        assert [call["function"]["name"] for call in calls] == names
        assert (out + left).strip() == content.strip()
        assert all(call["type"] == "function" and call["id"].startswith("call_") for call in calls)


class Counter(Decoder):
    """Counts on: behind token t comes t + 1, modulo 100. Remembers what it read."""

    goes_back = True

    def __init__(self, slots: int, context: int = 1000) -> None:
        self.slots, self.context = slots, context
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.seen: list[list[int]] = []  # tokens of each part, read by read

    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        self.check(parts)
        assert len({part.slot for part in parts}) == len(parts)
        self.seen.append([len(part.ids) for part in parts])
        for part in parts:
            self.held[part.slot] += part.ids.tolist()
        return [torch.nn.functional.one_hot((part.ids[-part.wanted :] + 1) % 100, 100).float() for part in parts]

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def keep(self, slot: int, length: int) -> int:
        del self.held[slot][length:]
        return len(self.held[slot])

    def copy(self, source: int, target: int, length: int) -> int:
        self.held[target] = self.held[source][:length]
        return len(self.held[target])


def engine(slots: int = 2, **options: Any) -> tuple[Engine, Counter]:
    decoder = Counter(slots)
    made = Engine(
        decoder, decode=lambda ids: "".join(f"{i};" for i in ids), stop=frozenset({99}), most=4, seconds=9, **options
    )
    return made, decoder


def job(prompt: list[int], most: int = 5, **options: Any) -> tuple[Job, list[Event]]:
    got: list[Event] = []
    made = {"deadline": time.monotonic() + 60} | options
    return Job(prompt=prompt, most=most, sampling=Sampling(), deliver=got.append, **made), got


def run(one: Engine, *jobs: Job) -> None:
    one.add(list(jobs))
    while one.running or one.waiting:
        one._turn()


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_jobs_share_steps_and_end_by_themselves() -> None:
    one, decoder = engine()
    (a, got_a), (b, got_b), (c, got_c) = job([1, 2, 3]), job([95]), job([40], stops=("42;",))
    run(one, a, b, c)
    assert text(got_a) == "4;5;6;7;8;" and got_a[-1] == End("length", 3, 5, 0)
    assert text(got_b) == "96;97;98;" and got_b[-1] == End("stop", 1, 4, 0)
    assert text(got_c) == "41;" and got_c[-1] == End("stop", 1, 2, 0)
    assert decoder.seen[0] == [3, 1] and all(len(parts) <= 2 for parts in decoder.seen) and len(decoder.seen) == 6


def test_a_long_prompt_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.serve.engine.TOKENS_AT_ONCE", 10)
    one, decoder = engine()
    (short, got), (long, other) = job([1], most=6), job([5] * 35, most=1)
    run(one, short, long)
    assert decoder.seen == [[1, 9], [1, 9], [1, 9], [1, 8], [1], [1]]
    assert text(got) == "2;3;4;5;6;7;" and text(other) == "6;"


def test_prompts_go_on_in_a_slot_or_a_copy() -> None:
    one, decoder = engine(slots=2)
    prompt = [*range(10), *range(40)]
    run(one, job(prompt)[0])
    run(one, job([*prompt, 7])[0])  # the same slot: what it holds is nearly all shared
    assert one.counts.cached == 50 and decoder.held[1] == []
    run(one, job([*range(10), 88, 88])[0])  # a copy of the ten, in the free slot: the long one stays
    assert (
        one.counts.cached == 60
        and decoder.held[0][:51] == [*prompt, 7]
        and decoder.held[1][:12] == [*range(10), 88, 88]
    )
    long = [3] * (WORTH_WAITING + 20)
    run(one, *(job(long, most=2)[0] for _ in range(2)))  # the second waits, then goes on from the first
    assert one.counts.cached == 60 + len(long) - 1


def test_who_leaves_or_is_late_is_dropped() -> None:
    one, decoder = engine(slots=1)
    (gone, got_gone), (late, got_late), (last, got_last) = job([1], most=90), job([1], deadline=0.0), job([7], most=2)
    one.add([gone, late, last])
    one._turn()
    gone.cancel()
    while one.running or one.waiting:
        one._turn()
    assert text(got_gone) == "2;" and isinstance(got_late[0], RequestError) and got_late[0].code == "timeout"
    assert text(got_last) == "8;9;" and decoder.held[0] == [7, 8]
    with pytest.raises(RequestError, match="waiting already"):
        one.add([job([1])[0] for _ in range(6)])


def test_proposals_are_read_together_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitwright.serve.engine.perf_counter", lambda: 0.0)
    for lookahead in (0, 6):
        one, decoder = engine(slots=1, lookahead=lookahead)
        made, got = job([*range(30), 0, 1, 2], most=20)
        run(one, made)
        assert text(got) == "".join(f"{i};" for i in range(3, 23)) and decoder.held[0][:33] == made.prompt
        assert len(decoder.seen) == 20 if not lookahead else len(decoder.seen) < 9
        assert one.counts.kept == one.counts.proposed == (0 if not lookahead else one.counts.kept)


def test_penalties_are_openais() -> None:
    """Platform documentation, "Frequency and presence penalties": logit − count · frequency − (count > 0) · presence."""
    logits = torch.zeros(4)
    changed = Penalties(((1, 5.0),), frequency=0.5, presence=0.25).applied(logits, {2: 3})
    assert changed.tolist() == [0, 5, -1.75, 0] and logits.tolist() == [0] * 4
    assert Penalties().applied(logits, {2: 3}) is logits
