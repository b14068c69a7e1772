"""Calls of tools read out of text, whole or in pieces cut anywhere."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmw.adapters.tool_calls import Called, ToolCallReader, Unreadable, chosen_tool, opening
from prefmw.errors import UsageError


def hermes(*calls: tuple[str, dict]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in calls
    )


def llama(*calls: tuple[str, dict]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def read(form, text, *, cuts=(), begun=""):
    """What a reader gives out for a text cut at these places; neighbouring texts are joined."""
    reader = ToolCallReader(form, begun)
    places = [0, *sorted(cuts), len(text)]
    parts = [part for start, end in pairwise(places) for part in reader.push(text[start:end])]
    joined: list = []
    for part in [*parts, *reader.finish()]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


WEATHER = ("weather", {"place": "Old Town"})
TIME = ("time", {})

CASES = [
    ("hermes", "Nothing to call.", ["Nothing to call."]),
    ("hermes", "a < b and <tool is no mark", ["a < b and <tool is no mark"]),
    ("hermes", hermes(WEATHER), [Called(*WEATHER)]),
    ("hermes", f"Let me see.\n\n{hermes(WEATHER, TIME)}\n", ["Let me see.", Called(*WEATHER), Called(*TIME)]),
    ("hermes", f"{hermes(WEATHER)}\nAnd then.", [Called(*WEATHER), "And then."]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', [Called("time", {})]),
    ("hermes", '<tool_call>{"name": "time", "arguments": null}</tool_call>', [Called("time", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [Called("f", {"a": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', [Called("f", {"a": 1})]),  # ended without its mark
    ("hermes", hermes(("say", {"text": "</tool_call> \\ \" {"})), [Called("say", {"text": "</tool_call> \\ \" {"})]),
    ("hermes", '<tool_call>{"name": "f", "argum', [Unreadable('{"name": "f", "argum')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', [Unreadable('{"name": "f", "arguments": {"a": "b')]),
    ("hermes", "<tool_call>weather(1)</tool_call>", [Unreadable("weather(1)")]),
    ("hermes", f"<tool_call>oops</tool_call>{hermes(TIME)}", [Unreadable("oops"), Called(*TIME)]),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', [Unreadable('{"name": "", "arguments": {}}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": 1}</tool_call>', [Unreadable('{"name": "f", "arguments": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
     [Unreadable('{"name": "f", "arguments": {"a": NaN}}')]),
    ("hermes", "<tool_call>[]</tool_call>", [Unreadable("[]")]),
    ("llama", "Nothing to call.", ["Nothing to call."]),
    ("llama", llama(WEATHER), [Called(*WEATHER)]),
    ("llama", f"  {llama(WEATHER, TIME)}\n", [Called(*WEATHER), Called(*TIME)]),
    ("llama", f"<|python_tag|>{llama(WEATHER)}", [Called(*WEATHER)]),
    ("llama", f"{llama(WEATHER)} And then.", [Called(*WEATHER), "And then."]),
    ("llama", '{"answer": 42} is JSON', ['{"answer": 42} is JSON']),
    ("llama", "{not JSON} at all", ["{not JSON} at all"]),
    ("llama", f"Call {llama(WEATHER)}", [f"Call {llama(WEATHER)}"]),
    ("llama", '{"name": "f", "parameters": {"a": "b', [Unreadable('{"name": "f", "parameters": {"a": "b')]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "parts"), CASES)
def test_calls_are_read_whole_and_letter_by_letter(form, text, parts):
    assert read(form, text) == parts
    assert read(form, text, cuts=range(1, len(text))) == parts


@given(data=st.data())
def test_where_a_text_is_cut_makes_no_difference(data):
    form, text, parts = data.draw(st.sampled_from(CASES))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert read(form, text, cuts=cuts) == parts


NAMES = st.text(min_size=1, max_size=8).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=6), VALUES, max_size=3)


@given(calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize(("form", "write"), [("hermes", hermes), ("llama", llama)])
def test_what_was_written_is_read(form, write, calls, data):
    text = write(*calls)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
    assert read(form, text, cuts=cuts) == [Called(*call) for call in calls]


@given(text=st.text(max_size=60), form=st.sampled_from(["hermes", "llama"]))
def test_no_text_is_lost_or_made_a_call(text, form):
    if "<tool_call>" in text or '"name"' in text:
        return
    assert "".join(read(form, text, cuts=range(len(text)))) == text


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"name": ' * 20_000, '{"name": "f", "arguments": {"a": ' + "9" * 5000]
)
@pytest.mark.parametrize("form", ["hermes", "llama"])
def test_what_no_parser_takes_is_unreadable_and_harms_nobody(form, text):
    if form == "hermes":
        text = f"<tool_call>{text}</tool_call>"
    (part,) = read(form, text)
    assert isinstance(part, str | Unreadable)


# Forced calls


@pytest.mark.parametrize(
    ("form", "forced", "begun"),
    [
        ("hermes", True, '<tool_call>\n{"name": "'),
        ("hermes", "weather", '<tool_call>\n{"name": "weather", "arguments": '),
        ("llama", True, '{"name": "'),
        ("llama", 'we"ird', '{"name": "we\\"ird", "parameters": '),
        ("llama", False, ""),
    ],
)
def test_a_forced_call_is_begun_as_far_as_it_is_known(form, forced, begun):
    assert "".join(text for text, _ in opening(form, forced)) == begun


@pytest.mark.parametrize("form", ["hermes", "llama"])
def test_what_a_reply_was_made_to_begin_with_is_part_of_the_call(form):
    begun = "".join(text for text, _ in opening(form, "weather"))
    rest = '{"place": "Old Town"}}' + ("\n</tool_call>" if form == "hermes" else "")
    assert read(form, rest, begun=begun) == [Called(*WEATHER)]
    assert read(form, rest, begun=begun, cuts=range(len(rest))) == [Called(*WEATHER)]
    assert isinstance(read(form, '{"place"', begun=begun)[0], Unreadable)


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        (None, False),
        ("auto", False),
        ("any", True),
        ("required", True),
        (True, True),
        ("time", "time"),
        ({"type": "function", "function": {"name": "time"}}, "time"),
        ({"type": "tool", "name": "time"}, "time"),
    ],
    ids=str,
)
def test_choices(choice, forced):
    assert chosen_tool(choice, ["weather", "time"]) == forced


def test_any_of_one_tool_is_that_tool():
    assert chosen_tool("any", ["weather"]) == "weather"


@pytest.mark.parametrize("choice", ["wether", {"function": {"name": "other"}}, {"name": "x"}, 3, ["weather"]])
def test_a_choice_that_is_none_of_the_tools_is_refused(choice):
    with pytest.raises(UsageError, match="none of the tools"):
        chosen_tool(choice, ["weather", "time"])
