"""ChatPrefMW: a LangChain chat model for a user id."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.errors import ContextLengthError, UsageError
from prefmw.guidance import Guidance
from prefmw.preferences import Source, Stated
from tests.adapters.conftest import QUESTION


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
    applied = reply.response_metadata["prefmw"]
    (conversation,) = people.conversations("alice")
    assert people.turns("alice", conversation.id)[0].id == applied.pop("turn")
    assert applied == {
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
    assert whole.response_metadata["prefmw"]["weights"] == plain.response_metadata["prefmw"]["weights"]
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


def test_stop_strings_end_the_reply_plain_and_in_pieces(chat):
    whole = chat.invoke(QUESTION, user_id="alice").content
    stop = whole[10:12]
    for asked in ({"stop": [stop]}, {"stop": ["never said", stop]}):
        reply = chat.invoke(QUESTION, user_id="alice", **asked)
        assert reply.content == whole.split(stop)[0]
        assert reply.response_metadata["finish_reason"] == "stop"
        chunks = list(chat.stream(QUESTION, user_id="alice", **asked))
        assert "".join(chunk.content for chunk in chunks) == reply.content
    own = chat.model_copy(update={"stop": [stop]})
    assert own.invoke(QUESTION, user_id="alice").content == whole.split(stop)[0]
    assert own.invoke(QUESTION, user_id="alice", stop=[]).content == whole  # a call's own win


def test_a_stop_string_of_any_length_does_no_harm(chat):
    whole = chat.invoke(QUESTION, user_id="alice").content
    assert chat.invoke(QUESTION, user_id="alice", stop=["x" * 10_000]).content == whole
    assert chat.invoke(QUESTION, user_id="alice", stop=[whole + "x" * 10_000]).content == whole
    assert chat.invoke(QUESTION, user_id="alice", stop=[""]).content == whole


def test_system_messages_are_read_together_wherever_they_stand(chat):
    both = [SystemMessage("Be kind.\n\nBe brief."), HumanMessage(QUESTION)]
    apart = [SystemMessage("Be kind."), HumanMessage(QUESTION), SystemMessage("Be brief.")]
    assert chat.invoke(apart, user_id="alice").content == chat.invoke(both, user_id="alice").content


# Beyond the context


def long_talk(rounds: int) -> list:
    talk = [SystemMessage("Be kind.")]
    for index in range(rounds):
        talk += [HumanMessage(f"Question {index}: how do I cook rice with lentils?"), AIMessage("Try it with onions.")]
    return [*talk, HumanMessage(QUESTION)]


def test_a_conversation_beyond_the_context_is_an_error_of_both_libraries(chat):
    with pytest.raises(ContextOverflowError, match=r"512.*on_overflow='trim'") as caught:
        chat.invoke(long_talk(40), user_id="alice")
    assert isinstance(caught.value, ContextLengthError)


@pytest.mark.parametrize("rounds", [10, 11, 40, 200])
def test_or_it_loses_its_oldest_exchanges_and_says_so(chat, rounds):
    trimming = chat.model_copy(update={"on_overflow": "trim", "max_tokens": 64})
    reply = trimming.invoke(long_talk(rounds), user_id="alice")
    (notice,) = reply.response_metadata["prefmw"]["notices"]
    left_out = int(notice.split()[2])
    assert notice.startswith("the oldest")
    assert left_out % 2 == 0
    assert reply.usage_metadata["input_tokens"] <= 512 - 64
    kept = [long_talk(rounds)[0], *long_talk(rounds)[1 + left_out :]]
    assert chat.model_copy(update={"max_tokens": 64}).invoke(kept, user_id="alice").content == reply.content
    one_more = [long_talk(rounds)[0], *long_talk(rounds)[1 + left_out - 2 :]]
    assert trimming.invoke(one_more, user_id="alice").response_metadata["prefmw"]["notices"] != []


def test_a_conversation_that_fits_loses_nothing(chat):
    trimming = chat.model_copy(update={"on_overflow": "trim"})
    assert trimming.invoke(long_talk(2), user_id="alice").response_metadata["prefmw"]["notices"] == []


def test_a_question_that_does_not_fit_by_itself_is_an_error_all_the_same(chat):
    trimming = chat.model_copy(update={"on_overflow": "trim"})
    for talk in ([HumanMessage("word " * 600)], [*long_talk(3), AIMessage("Yes?"), HumanMessage("word " * 600)]):
        with pytest.raises(ContextOverflowError) as caught:
            trimming.invoke(talk, user_id="alice")
        assert "on_overflow" not in str(caught.value)


def test_a_reply_that_a_persrm_guides_is_trimmed_like_any_other(people):
    tiny = ChatPrefMW(model="tiny", on_overflow="trim", max_tokens=8, seed=1)
    assert tiny.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["method"] == "pad"
    reply = tiny.invoke(long_talk(100), user_id="alice")
    assert reply.response_metadata["prefmw"]["notices"][0].startswith("the oldest")


def test_numbers_may_be_numpy_s(chat):
    asked = {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "strength": np.float16(1), "seed": np.int64(3)}
    plain = {"temperature": 0.5, "top_p": 0.5, "strength": 1.0, "seed": 3}
    replies = [chat.invoke(QUESTION, user_id="alice", **numbers) for numbers in (asked, plain)]
    assert replies[0].content == replies[1].content
    assert replies[0].response_metadata["prefmw"]["turn"] is not None


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


def test_pad_steers_by_a_persrm_and_is_cached_under_its_name_and_revision(people, monkeypatch):
    chat = ChatPrefMW(model="tiny", user_id="bob", method="pad", candidate="greedy", max_tokens=8, seed=1)
    assert chat.invoke(QUESTION).response_metadata["prefmw"]["method"] == "pad"
    keys = {str(chat._call([HumanMessage(QUESTION)], None, {"user_id": "bob"})) for _ in range(2)}
    assert len(keys) == 1
    monkeypatch.setattr(Guidance, "label", "another")
    assert str(chat._call([HumanMessage(QUESTION)], None, {"user_id": "bob"})) not in keys


def test_pad_without_a_persrm_is_refused(chat):
    with pytest.raises(UsageError, match="needs a PersRM"):
        chat.invoke("Hello", user_id="bob", method="pad")


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="methd"):
        ChatPrefMW(methd="linear")


def test_a_change_of_its_fields_takes_effect(chat, people, tmp_path):
    chat.invoke(QUESTION, user_id="alice")
    people.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    elsewhere = chat.model_copy(update={"database": str(tmp_path / "other.db")})
    assert elsewhere.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["revision"] == 1
    assert chat.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["revision"] == 2
    chat.database = str(tmp_path / "other.db")
    assert chat.invoke(QUESTION, user_id="alice").response_metadata["prefmw"]["revision"] == 1


def test_after_use_it_is_copied_and_pickled_as_its_configuration(chat):
    reply = chat.invoke(QUESTION, user_id="alice").content
    for again in (copy.copy(chat), copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))):
        assert again.model_dump() == chat.model_dump()
        assert again.invoke(QUESTION, user_id="alice").content == reply


def test_a_pickle_holds_no_password_and_nothing_that_was_opened(chat):
    secret = "postgresql+psycopg://u:s3cret@h:5432/d?sslmode=require&password=s3cret"
    built = ChatPrefMW(database=secret)
    stored = pickle.dumps(built)
    assert b"s3cret" not in stored
    again = pickle.loads(stored)
    assert again.database == "postgresql+psycopg://u@h:5432/d?sslmode=require"
    assert copy.copy(built).database == copy.deepcopy(built).database == secret
    before = len(pickle.dumps(chat))
    chat.invoke(QUESTION, user_id="alice")
    assert len(pickle.dumps(chat)) == before < 2000


def test_a_call_may_name_another_model(chat, tmp_path):
    from tests.toymodels import save_chat_model

    other = str(save_chat_model(tmp_path / "other", "qwen"))
    assert chat.invoke(QUESTION, user_id="alice", model=other).response_metadata["model_name"] == other
    assert chat.invoke(QUESTION, user_id="alice").response_metadata["model_name"] == chat.model
    assert chat.invoke(QUESTION, user_id="alice", model=None).response_metadata["model_name"] == chat.model


def test_traces_name_the_model_that_answers(chat, monkeypatch):
    assert chat._get_ls_params(model="other")["ls_model_name"] == "other"
    assert ChatPrefMW()._get_ls_params()["ls_model_name"] == "tiny"
    monkeypatch.setenv("PREFMW_MODEL", "some/model")
    assert ChatPrefMW(stop=["x"])._get_ls_params()["ls_stop"] == ["x"]
    assert ChatPrefMW()._get_ls_params()["ls_model_name"] == "some/model"


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
        ({"input": QUESTION, "user_id": "alice", "nonsense": 1}, UsageError, "nonsense"),
        ({"input": QUESTION, "user_id": 3}, UsageError, "user id is text"),
        ({"input": QUESTION, "user_id": "alice", "strength": "2"}, UsageError, "strength is a number"),
        ({"input": QUESTION, "user_id": "alice", "max_tokens": "5"}, UsageError, "whole number"),
        ({"input": QUESTION, "user_id": "alice", "stop": [3]}, UsageError, "stop takes"),
        ({"input": QUESTION, "user_id": "alice", "stop": "abc"}, UsageError, "stop takes"),
        ({"input": QUESTION, "user_id": "alice", "method": 3}, UsageError, "named by text"),
        ({"input": QUESTION, "user_id": "alice", "model": ["tiny"]}, UsageError, "named by text"),
        ({"input": QUESTION, "user_id": "alice", "model": "no/such/model"}, UsageError, "no/such/model"),
        ({"input": QUESTION, "user_id": "alice", "plan": "mine"}, UsageError, "takes no plan"),
        ({"input": QUESTION, "user_id": "alice", "temperature": "a"}, UsageError, "temperature is a number"),
        ({"input": [HumanMessage([{"type": "text"}])], "user_id": "alice"}, UsageError, "content block"),
        ({"input": [ToolMessage("x", tool_call_id="1")], "user_id": "alice"}, UsageError, "takes no tools"),
        ({"input": [], "user_id": "alice"}, UsageError, "nothing to answer"),
        ({"input": "  ", "user_id": "alice"}, UsageError, "nothing to answer"),
        ({"input": [AIMessage("Hi.")], "user_id": "alice"}, UsageError, "nothing to answer"),
        ({"input": [SystemMessage("Be kind.")], "user_id": "alice"}, UsageError, "nothing to answer"),
        ({"input": [RemoveMessage(id="1")], "user_id": "alice"}, UsageError, "RemoveMessage"),
        ({"input": [FunctionMessage("x", name="f")], "user_id": "alice"}, UsageError, "FunctionMessage"),
        ({"input": [ChatMessage("x", role="critic")], "user_id": "alice"}, UsageError, "ChatMessage"),
        ({"input": "nul \0", "user_id": "alice"}, UsageError, "NUL"),
        (
            {"input": [HumanMessage([{"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}])], "user_id": "a"},
            UsageError,
            "'audio' in a message of type 'human'",
        ),
        ({"input": [SystemMessage([{"type": "image", "url": "x"}])], "user_id": "a"}, UsageError, "'image'"),
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
