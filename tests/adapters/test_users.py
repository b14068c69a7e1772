"""Whose preferences apply: every way to say so, at every entry point."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.runnables import ConfigurableField

from prefmw.adapters.langchain import ChatPrefMW
from prefmw.errors import UnknownUserError, UsageError
from tests.adapters.conftest import QUESTION
from tests.adapters.entrypoints import ANYWHERE, ON_A_MODEL, WITH_KEYWORDS, chains

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]

BOB = {"configurable": {"user_id": "bob"}}


def user_of(message) -> str | None:
    return message.response_metadata["prefmw"]["user"]


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_a_keyword_names_the_user_at_every_entry_point(chat, entry):
    reply = await WITH_KEYWORDS[entry](chat, QUESTION, None, {"user_id": "bob"})
    assert user_of(reply) == "bob"


@pytest.mark.parametrize("entry", ON_A_MODEL)
async def test_the_config_names_the_user_at_every_entry_point(chat, entry):
    assert user_of(await ON_A_MODEL[entry](chat, QUESTION, BOB, {})) == "bob"
    assert user_of(await ON_A_MODEL[entry](chat, QUESTION, BOB, {"user_id": "alice"})) == "alice"  # a keyword wins


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_the_object_s_own_user_comes_last(chat, entry):
    chat = chat.model_copy(update={"user_id": "alice"})
    assert user_of(await WITH_KEYWORDS[entry](chat, QUESTION, None, {})) == "alice"
    if entry in ON_A_MODEL:
        assert user_of(await ON_A_MODEL[entry](chat, QUESTION, BOB, {})) == "bob"


@pytest.mark.parametrize("entry", ANYWHERE)
@pytest.mark.parametrize("chain", chains(ChatPrefMW()))
async def test_the_config_of_a_chain_reaches_the_model_inside(chat, chain, entry):
    assert user_of(await ANYWHERE[entry](chains(chat)[chain], QUESTION, BOB, {})) == "bob"


@pytest.mark.parametrize("entry", ANYWHERE)
async def test_a_bound_user_or_config_goes_with_the_model(chat, entry):
    assert user_of(await ANYWHERE[entry](chat.bind(user_id="bob"), QUESTION, None, {})) == "bob"
    assert (
        user_of(await ANYWHERE[entry](chat.with_config(configurable={"user_id": "bob"}), QUESTION, None, {})) == "bob"
    )


async def test_calls_gathered_each_have_their_own_user(chat):
    users = ["alice", "bob"] * 4
    replies = await asyncio.gather(
        *(chat.ainvoke(QUESTION, {"configurable": {"user_id": user}}) for user in users[:4]),
        *(chat.ainvoke(QUESTION, user_id=user) for user in users[4:]),
    )
    assert [user_of(reply) for reply in replies] == users


@pytest.mark.parametrize("entry", ["batch", "abatch"])
async def test_a_batch_may_be_for_different_users(chat, entry):
    configs = [{"configurable": {"user_id": user}} for user in ("alice", "bob", "alice")]
    for runnable in (chat, chains(chat)["sequence"]):
        found = runnable.batch([QUESTION] * 3, configs)
        found += await runnable.abatch([QUESTION] * 3, configs)
        assert [user_of(reply) for reply in found] == ["alice", "bob", "alice"] * 2


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_nobody_is_an_error_that_names_the_ways(chat, entry):
    with pytest.raises(UsageError, match=r"user_id=.*bind.*configurable.*ChatPrefMW\(user_id") as caught:
        await WITH_KEYWORDS[entry](chat, QUESTION, None, {})
    assert "base" in str(caught.value)


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_nobody_may_be_answered_without_preferences(chat, people, entry):
    open_to_all = chat.model_copy(update={"on_missing_user": "base", "method": None})
    reply = await WITH_KEYWORDS[entry](open_to_all, QUESTION, None, {})
    plain = chat.invoke(QUESTION, user_id="alice", method="none")
    assert reply.text == plain.text
    applied = reply.response_metadata["prefmw"]
    assert (applied["user"], applied["method"], applied["weights"], applied["turn"]) == (None, "none", {}, None)


@pytest.mark.parametrize("entry", WITH_KEYWORDS)
async def test_a_keyword_of_none_is_nobody_whoever_the_config_names(chat, entry):
    chat = chat.model_copy(update={"user_id": "alice"})
    with pytest.raises(UsageError, match="whose preferences"):
        await WITH_KEYWORDS[entry](chat, QUESTION, None, {"user_id": None})
    if entry in ON_A_MODEL:
        open_to_all = chat.model_copy(update={"on_missing_user": "base"})
        assert user_of(await ON_A_MODEL[entry](open_to_all, QUESTION, BOB, {"user_id": None})) is None


@pytest.mark.parametrize("user", ["", " ", "a\nb", "x" * 129, 3, ["alice"]])
def test_what_is_no_user_id_is_refused_though_the_object_has_one(chat, user):
    chat = chat.model_copy(update={"user_id": "alice"})
    with pytest.raises(UsageError, match="user id"):
        chat.invoke(QUESTION, user_id=user)
    with pytest.raises(UsageError, match="user id"):
        chat.invoke(QUESTION, {"configurable": {"user_id": user}})


# Users whom the store does not know


def test_an_unknown_user_is_added(chat, people):
    assert chat.invoke(QUESTION, user_id="carol").response_metadata["prefmw"]["revision"] == 1
    (revision,) = people.revisions("carol")
    assert (revision.actor, revision.reason) == ("prefmw", "first call through LangChain")


async def test_calls_at_once_add_an_unknown_user_once(chat, people):
    replies = await chat.abatch([QUESTION] * 8, {"configurable": {"user_id": "carol"}})
    assert {user_of(reply) for reply in replies} == {"carol"}
    assert len(people.revisions("carol")) == 1


def test_an_unknown_user_may_be_an_error(chat, people):
    with pytest.raises(UnknownUserError, match="carol"):
        chat.model_copy(update={"on_unknown_user": "raise"}).invoke(QUESTION, user_id="carol")
    assert [profile.user_id for profile in people.users()] == ["alice", "bob"]


def test_an_unknown_user_may_be_answered_as_nobody(chat, people):
    reply = chat.model_copy(update={"on_unknown_user": "base"}).invoke(QUESTION, user_id="carol")
    applied = reply.response_metadata["prefmw"]
    assert (applied["user"], applied["method"]) == (None, "none")
    assert "does not know this user" in applied["notices"][0]
    assert [profile.user_id for profile in people.users()] == ["alice", "bob"]


@pytest.mark.parametrize("wrong", [{"strength": 99.0}, {"method": "magic"}, {"input": []}, {"input": ""}])
def test_a_call_that_is_refused_adds_nobody(chat, people, wrong):
    with pytest.raises(UsageError):
        chat.invoke(**{"input": QUESTION, "user_id": "carol", **wrong})
    assert [profile.user_id for profile in people.users()] == ["alice", "bob"]


# What else a config may set


def test_method_and_strength_are_configurable_fields(chat):
    steerable = chat.configurable_fields(
        method=ConfigurableField(id="method"), strength=ConfigurableField(id="strength")
    )
    reply = steerable.invoke(QUESTION, {"configurable": {"user_id": "bob", "method": "linear", "strength": 4.0}})
    applied = reply.response_metadata["prefmw"]
    assert (applied["user"], applied["method"], applied["strength"]) == ("bob", "linear", 4.0)
    chunks = list(steerable.stream(QUESTION, {"configurable": {"user_id": "bob", "strength": 0.0}}))
    assert len(chunks) > 3
    assert chunks[-1].response_metadata["prefmw"]["strength"] == 0.0


def test_configured_copies_share_one_store(chat, people, monkeypatch):
    from prefmw.adapters import opening

    opened = []
    monkeypatch.setattr(opening, "open_store", lambda settings: opened.append(1) or people)
    steerable = chat.configurable_fields(strength=ConfigurableField(id="strength"))
    for strength in (0.0, 1.0, 2.0):
        steerable.invoke(QUESTION, {"configurable": {"user_id": "bob", "strength": strength}})
    assert opened == [1]
