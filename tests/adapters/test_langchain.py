"""ChatPrefMW: a LangChain chat model for a user id."""

from __future__ import annotations

import subprocess
import sys

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.bootstrap import close_engines, open_store
from prefmw.errors import UnknownUserError, UsageError
from prefmw.preferences import Source, Stated
from prefmw.settings import load_settings

QUESTION = "How do I fall asleep faster?"


@pytest.fixture
def people():
    store = open_store(load_settings())
    store.add_user("alice", persona="a nurse on night shifts", actor="test")
    store.add_user("bob", persona="a cook", actor="test")
    yield store
    store.close()


@pytest.fixture
def chat(toy, people):
    yield ChatPrefMW(model=str(toy), method="linear", max_tokens=24, seed=1)
    close_engines()


def test_a_reply_is_for_the_user_of_the_call(chat):
    alice, bob = (chat.invoke(QUESTION, user_id=user) for user in ("alice", "bob"))
    assert alice.content != bob.content
    assert chat.invoke(QUESTION, user_id="alice").content == alice.content
    assert [m.response_metadata["prefmw"]["user"] for m in (alice, bob)] == ["alice", "bob"]


def test_a_reply_says_what_was_applied(chat, people):
    people.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    reply = chat.invoke(QUESTION, user_id="alice")
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.response_metadata["model_name"] == chat.model
    assert reply.response_metadata["prefmw"] == {
        "user": "alice",
        "revision": 2,
        "method": "linear",
        "strength": 2.0,
        "weights": {"humor": 0.5},
        "seed": 1,
        "notices": [],
    }
    assert reply.usage_metadata["output_tokens"] == 24


def test_streamed_chunks_add_up_to_the_reply(chat):
    chunks = list(chat.stream(QUESTION, user_id="alice"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    plain = chat.invoke(QUESTION, user_id="alice")
    assert len(chunks) > 3
    assert whole.content == plain.content
    assert whole.usage_metadata == plain.usage_metadata
    assert whole.response_metadata["prefmw"] == plain.response_metadata["prefmw"]
    assert chunks[-1].chunk_position == "last"


def test_it_stands_in_a_chain(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{question}")])
    chain = prompt | chat.bind(user_id="alice") | StrOutputParser()
    assert chain.invoke({"question": QUESTION})


def test_the_user_may_belong_to_the_object(toy, people):
    chat = ChatPrefMW(model=str(toy), user_id="bob", max_tokens=4)
    assert chat.invoke(QUESTION).response_metadata["prefmw"]["user"] == "bob"
    assert chat.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["user"] == "alice"


def test_options_of_a_call_win(chat):
    reply = chat.invoke(QUESTION, user_id="alice", method="none", max_tokens=3)
    assert reply.response_metadata["prefmw"]["method"] == "none"
    assert reply.usage_metadata["output_tokens"] == 3


def test_history_system_prompt_and_content_blocks_are_read(chat):
    short = chat.invoke([HumanMessage(QUESTION)], user_id="alice")
    blocks = HumanMessage([{"type": "text", "text": "How do I fall "}, {"type": "text", "text": "asleep faster?"}])
    assert chat.invoke([blocks], user_id="alice").content == short.content
    long = [SystemMessage("Be kind."), HumanMessage("Hi."), AIMessage("Hello."), blocks]
    assert chat.invoke(long, user_id="alice").usage_metadata["input_tokens"] > short.usage_metadata["input_tokens"]


def test_stop_strings_end_the_reply(chat):
    whole = chat.invoke(QUESTION, user_id="alice").content
    assert chat.invoke(QUESTION, user_id="alice", stop=[whole[10:12]]).content == whole.split(whole[10:12])[0]


def test_a_global_cache_keeps_nothing_of_one_user_for_another(chat, people):
    from langchain_core.caches import InMemoryCache
    from langchain_core.globals import set_llm_cache

    set_llm_cache(InMemoryCache())
    try:
        before = chat.invoke(QUESTION, user_id="alice")
        assert chat.invoke(QUESTION, user_id="bob").content != before.content
        people.write_weights("alice", {"humor": Stated(1.0)}, source=Source.user, actor="test")
        assert chat.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["revision"] == 2
    finally:
        set_llm_cache(None)


def test_a_stream_left_open_when_the_program_ends_is_recorded(toy, people):
    code = f"""
from prefmw.adapters.langchain import ChatPrefMW
stream = ChatPrefMW(model={str(toy)!r}, user_id="alice", max_tokens=200, seed=1).stream("Hello")
print(next(stream).content)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    (conversation,) = people.conversations("alice")
    (turn,) = people.turns("alice", conversation.id)
    assert (turn.finish_reason, turn.prompt) == ("interrupted", "Hello")
    assert turn.text == result.stdout.removesuffix("\n")


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="methd"):
        ChatPrefMW(methd="linear")


def test_a_cache_of_its_own_is_refused():
    from langchain_core.caches import InMemoryCache

    with pytest.raises(ValueError, match="cache"):
        ChatPrefMW(cache=InMemoryCache())


def test_calls_at_once_share_one_store(chat, monkeypatch):
    from prefmw.adapters import langchain as module

    opened = []
    monkeypatch.setattr(module, "open_store", lambda settings: opened.append(1) or open_store(settings))
    replies = chat.batch([QUESTION] * 4, user_id="alice")
    assert len({reply.content for reply in replies}) == 1
    assert opened == [1]


def test_a_change_of_its_fields_takes_effect(chat, people, tmp_path):
    chat.invoke(QUESTION, user_id="alice")
    elsewhere = chat.model_copy(update={"database": str(tmp_path / "other.db")})
    with pytest.raises(UnknownUserError):
        elsewhere.invoke(QUESTION, user_id="alice")
    chat.database = str(tmp_path / "other.db")
    with pytest.raises(UnknownUserError):
        chat.invoke(QUESTION, user_id="alice")


def test_after_use_it_is_copied_and_pickled_as_its_configuration(chat):
    import copy
    import pickle

    reply = chat.invoke(QUESTION, user_id="alice").content
    for again in (copy.copy(chat), copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))):
        assert again.model_dump() == chat.model_dump()
        assert again.invoke(QUESTION, user_id="alice").content == reply


def test_tokens_are_counted_by_the_model_s_own_tokenizer(chat):
    assert chat.get_num_tokens("hello there") == len(chat.get_token_ids("hello there")) > 1


def test_a_password_is_not_shown():
    assert "s3cret" not in repr(ChatPrefMW(database="postgresql+psycopg://u:s3cret@h/d"))


def test_building_the_object_is_free(home):
    ChatPrefMW(model="no-such-model", user_id="nobody")
    assert not home.exists()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"input": QUESTION}, UsageError, "user_id"),
        ({"input": QUESTION, "user_id": "carol"}, UnknownUserError, "carol"),
        ({"input": QUESTION, "user_id": "alice", "nonsense": 1}, UsageError, "nonsense"),
        ({"input": QUESTION, "user_id": 3}, UsageError, "user id is text"),
        ({"input": QUESTION, "user_id": "alice", "strength": "2"}, UsageError, "strength is a number"),
        ({"input": QUESTION, "user_id": "alice", "max_tokens": "5"}, UsageError, "whole number"),
        ({"input": QUESTION, "user_id": "alice", "stop": [3]}, UsageError, "stop takes"),
        ({"input": QUESTION, "user_id": "alice", "stop": "abc"}, UsageError, "stop takes"),
        ({"input": QUESTION, "user_id": "alice", "method": 3}, UsageError, "named by text"),
        ({"input": QUESTION, "user_id": "alice", "temperature": "a"}, UsageError, "temperature is a number"),
        ({"input": [HumanMessage([{"type": "text"}])], "user_id": "alice"}, UsageError, "content block"),
        ({"input": [ToolMessage("x", tool_call_id="1")], "user_id": "alice"}, UsageError, "ToolMessage"),
        (
            {"input": [HumanMessage([{"type": "image_url", "image_url": "http://x"}])], "user_id": "alice"},
            UsageError,
            "image_url",
        ),
    ],
)
def test_mistakes_are_told(chat, call, error, message):
    with pytest.raises(error, match=message):
        chat.invoke(**call)
