"""ChatPrefMW with tools: what the model is shown, what is read out of its replies, and what is refused."""

from __future__ import annotations

import json

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.errors import ChatTemplateError, UsageError
from prefmw.preferences import Message, ToolCall
from tests.adapters.conftest import QUESTION
from tests.adapters.entrypoints import WITH_KEYWORDS, added
from tests.adapters.scripted import scripted
from tests.toymodels import save_chat_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]


@tool
def weather(place: str, days: int = 1) -> str:
    """The weather at a place."""
    return "sunny"


@tool
def clock() -> str:
    """The time."""
    return "noon"


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"place": "Ghent", "days": 2}}\n</tool_call>',
    "llama31": '{"name": "weather", "parameters": {"place": "Ghent", "days": 2}}',
}
READ = ("weather", {"place": "Ghent", "days": 2})


@pytest.fixture(params=WRITTEN)
def family(request):
    return request.param


@pytest.fixture
def model(people, tmp_path, family):
    """A model of that family that says what it is told to say; its engine has the prompts."""

    def make(says: str, **fields):
        folder = save_chat_model(tmp_path / "model", family, context=4096)
        return ChatPrefMW(model=str(folder), user_id="alice", **fields), scripted(folder, lambda prompt: says)

    return make


def calls(message) -> list[tuple[str, dict]]:
    assert all(call["id"].startswith("call_") for call in message.tool_calls)
    return [(call["name"], call["args"]) for call in message.tool_calls]


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_calls_are_read_at_every_entry_point(model, family, entry):
    chat, _ = model(WRITTEN[family])
    reply = await WITH_KEYWORDS[entry](chat, QUESTION, None, {"tools": [weather, clock]})
    assert (calls(reply), reply.invalid_tool_calls, reply.text) == ([READ], [], "")


def test_both_views_show_the_tools_and_one_the_preferences(model):
    chat, engine = model("Hello.", method="linear")
    reply = chat.bind_tools([weather, clock]).invoke(QUESTION)
    assert reply.content == "Hello."
    assert reply.tool_calls == []
    ((plain, steered),) = engine.prompts
    for prompt in (plain, steered):
        assert all(word in prompt for word in ("The weather at a place.", '"name": "clock"', QUESTION))
    assert ("nurse" in plain, "nurse" in steered) == (False, True)


def test_text_beside_a_call_and_several_calls(model, family):
    if family == "hermes":
        said = f"Let me see.\n{WRITTEN[family]}\n{WRITTEN[family]}"
        expected = ("Let me see.", [READ, READ])
    else:
        said, expected = f"{WRITTEN[family]}; {WRITTEN[family]}", ("", [READ, READ])
    chat, _ = model(said)
    bound = chat.bind_tools([weather])
    whole = bound.invoke(QUESTION)
    streamed = added(list(bound.stream(QUESTION)))
    for reply in (whole, streamed):
        assert (reply.content, calls(reply)) == expected
        assert len({call["id"] for call in reply.tool_calls}) == 2


def test_text_is_streamed_before_a_call_is_whole(model, family):
    if family != "hermes":
        pytest.skip("Llama 3's calls have no text beside them")
    chat, _ = model(f"Let me see.\n{WRITTEN[family]}")
    chunks = list(chat.bind_tools([weather]).stream(QUESTION))
    assert len([chunk for chunk in chunks if chunk.content]) > 1
    assert [len(chunk.tool_call_chunks) for chunk in chunks if chunk.tool_call_chunks] == [1]
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("cut", [5, 10, 20])
def test_a_call_that_was_cut_off_is_invalid_and_not_mended(model, family, cut):
    chat, _ = model(WRITTEN[family], max_tokens=cut)
    bound = chat.bind_tools([weather])
    for reply in (bound.invoke(QUESTION), added(list(bound.stream(QUESTION)))):
        assert reply.response_metadata["finish_reason"] == "length"
        assert reply.tool_calls == []
        assert len(reply.invalid_tool_calls) + bool(reply.text) == 1


def test_what_the_model_wrote_in_place_of_a_call_is_shown_to_it_again(model, family):
    broken = WRITTEN[family].replace("2}", "two}")
    chat, engine = model(broken)
    bound = chat.bind_tools([weather])
    reply = bound.invoke(QUESTION)
    if family == "llama31":
        pytest.skip("what is no JSON is text, to Llama 3") if reply.text else None
    (invalid,) = reply.invalid_tool_calls
    answer = ToolMessage("that was no call", tool_call_id=invalid["id"])
    bound.invoke([HumanMessage(QUESTION), reply, answer])
    assert '"days": two' in engine.prompts[-1][-1]
    assert "that was no call" in engine.prompts[-1][-1]


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_reply_of_either_output_version_is_read_again(model, version, family):
    chat, engine = model(WRITTEN[family], output_version=version)
    bound = chat.bind_tools([weather])
    reply = bound.invoke(QUESTION)
    bound.invoke([HumanMessage(QUESTION), reply, ToolMessage("sunny", tool_call_id=reply.tool_calls[0]["id"])])
    assert engine.prompts[-1][-1].count('"Ghent"') == 1
    assert "sunny" in engine.prompts[-1][-1]


def test_what_another_model_did_beside_its_words_is_not_read(model, family):
    chat, engine = model("It is sunny.")
    done = [
        {"type": "reasoning", "reasoning": "SECRET"},
        {"type": "server_tool_call", "id": "1", "name": "web_search", "args": {"query": "SECRET"}},
        {"type": "server_tool_result", "tool_call_id": "1", "status": "success", "output": "SECRET"},
        {"type": "text", "text": "Look outside."},
    ]
    chat.invoke([HumanMessage(QUESTION), AIMessage(done), HumanMessage("And?")])
    assert "Look outside." in engine.prompts[-1][-1]
    assert "SECRET" not in engine.prompts[-1][-1]


def test_answers_are_rendered_back_and_the_turn_recorded(model, people, family):
    chat, engine = model("It is sunny.")
    call = {"name": "weather", "args": {"place": "Ghent 夜"}, "id": "abc", "type": "tool_call"}
    talk = [
        HumanMessage(QUESTION),
        AIMessage([{"type": "tool_use", "id": "abc", "name": "weather", "input": {}}], tool_calls=[call]),
        ToolMessage([{"type": "text", "text": "sunny"}], tool_call_id="abc"),
    ]
    reply = chat.bind_tools([weather]).invoke(talk)
    assert reply.content == "It is sunny."
    prompt = engine.prompts[-1][-1]
    key = "arguments" if family == "hermes" else "parameters"
    assert f'{{"name": "weather", "{key}": {{"place": "Ghent 夜"}}}}' in prompt
    assert "sunny" in prompt
    (conversation,) = people.conversations("alice")
    (turn,) = people.turns("alice", conversation.id)
    assert (turn.prompt, turn.text) == ("", "It is sunny.")
    assert turn.history == (
        Message("user", QUESTION),
        Message("assistant", "", (ToolCall("weather", '{"place": "Ghent 夜"}', "abc"),)),
        Message("tool", "sunny", answers="abc"),
    )
    assert [one["function"]["name"] for one in turn.plan["tools"]] == ["weather"]


def test_a_choice_makes_the_reply_begin_with_a_call(model, family):
    begun = {"hermes": '<tool_call>\n{"name": "clock", "arguments": ', "llama31": '{"name": "clock", "parameters": '}
    chat, engine = model("{}}" + ("\n</tool_call>" if family == "hermes" else ""))
    reply = chat.bind_tools([weather, clock], tool_choice="clock").invoke(QUESTION)
    assert engine.prompts[-1][-1].endswith(begun[family])
    assert calls(reply) == [("clock", {})]
    assert calls(added(list(chat.bind_tools([clock], tool_choice="any").stream(QUESTION)))) == [("clock", {})]
    chat.bind_tools([weather, clock], tool_choice="any").invoke(QUESTION)
    assert engine.prompts[-1][-1].endswith('"name": "')


def test_the_choice_of_none_offers_none(model, family):
    chat, engine = model(WRITTEN[family])
    reply = chat.bind_tools([weather], tool_choice="none").invoke(QUESTION)
    assert "The weather at a place." not in engine.prompts[-1][-1]
    assert (reply.tool_calls, reply.content) == ([], WRITTEN[family])


def test_a_choice_of_tools_where_there_are_none_is_refused(model):
    chat, _ = model("It is sunny.")
    with pytest.raises(UsageError, match="needs tools"):
        chat.invoke(QUESTION, tool_choice="any")


def test_without_tools_a_reply_is_text_whatever_it_looks_like(model, family):
    chat, _ = model(WRITTEN[family])
    assert chat.invoke(QUESTION).content == WRITTEN[family]


def test_structured_output_is_what_was_asked_for_or_an_error(model, family):
    class Weather(BaseModel):
        """The weather."""

        place: str
        days: int = 1

    rest = '{"place": "Ghent"}}' + ("\n</tool_call>" if family == "hermes" else "")
    chat, _ = model(rest)
    assert chat.with_structured_output(Weather).invoke(QUESTION) == Weather(place="Ghent")
    raw = chat.with_structured_output(Weather.model_json_schema(), include_raw=True).invoke(QUESTION)
    assert (raw["parsed"], raw["parsing_error"]) == ({"place": "Ghent"}, None)
    chat, _ = model(rest.replace("place", "town"))
    with pytest.raises(ValueError, match="place"):
        chat.with_structured_output(Weather).invoke(QUESTION)


def test_tools_are_part_of_a_cache_s_key(model, family):
    chat, engine = model(WRITTEN[family], cache=InMemoryCache())
    for bound in (chat, chat.bind_tools([weather]), chat.bind_tools([clock]), chat.bind_tools([weather])):
        bound.invoke(QUESTION)
    assert len(engine.prompts) == 3


def test_a_model_whose_template_takes_no_tools_says_so_before_it_is_asked(chat, people):
    for bound in (chat.bind_tools([weather]), chat.with_structured_output(weather.args_schema)):
        with pytest.raises(ChatTemplateError, match="takes no tools"):
            bound.invoke(QUESTION, user_id="alice")
        with pytest.raises(ChatTemplateError, match="takes no tools"):
            list(bound.stream(QUESTION, user_id="alice"))
    assert list(people.conversations("alice")) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tools": [weather], "tool_choice": "wether"}, "did you mean 'weather'"),
        ({"tools": [{"type": "web_search"}]}, "'web_search'"),
    ],
)
def test_mistakes_are_told(model, asked, message):
    chat, _ = model("Hello.")
    with pytest.raises(UsageError, match=message):
        chat.invoke(QUESTION, **asked)


def test_arguments_of_any_json_come_back_as_they_were(model, family):
    arguments = {"a": [1, 2.5, None, True], "b": {"c": '"quoted" \\ \n 夜 </tool_call>'}, "": {}}
    key = "arguments" if family == "hermes" else "parameters"
    body = json.dumps({"name": "any", key: arguments}, ensure_ascii=False)
    chat, _ = model(f"<tool_call>\n{body}\n</tool_call>" if family == "hermes" else body)
    bound = chat.bind_tools([weather])
    assert calls(bound.invoke(QUESTION)) == [("any", arguments)]
    assert calls(added(list(bound.stream(QUESTION)))) == [("any", arguments)]
