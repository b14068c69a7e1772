"""Agents: each run follows the preferences of the user it is for, and a thread keeps to its owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    ContextEditingMiddleware,
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
    TodoListMiddleware,
    ToolRetryMiddleware,
)
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import ConfigurableField
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import Field, PrivateAttr

from prefmw import bootstrap
from prefmw.adapters.middleware import PreferenceContext, PreferenceMiddleware, new_words, with_principle
from prefmw.errors import PrefmwError, StoreError, ThreadOwnerError, UnknownUserError, UsageError
from prefmw.preferences import Source, Stated, default_dimensions
from prefmw.preferences.inference import Inferer
from tests.adapters.conftest import QUESTION
from tests.preferences.test_inference import WordReadOut

ALICE, BOB = PreferenceContext("alice"), PreferenceContext("bob")
THREAD = {"configurable": {"thread_id": "1"}}


class Reader(BaseChatModel):
    """A model that can only read: it remembers what it was given and says what it was told to say."""

    says: list[Any] = Field(default=["Very well."])
    _given: list = PrivateAttr(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "reader"

    @property
    def given(self) -> list[list]:
        """The messages of every call."""
        return self._given

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self._given.append(messages)
        said = self.says[min(len(self._given), len(self.says)) - 1]
        if isinstance(said, Exception):
            raise said
        message = said.model_copy() if isinstance(said, AIMessage) else AIMessage(said)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def bind_tools(self, tools, *, tool_choice=None, **kwargs):
        return self.bind(**kwargs)


def called(tool: str, **arguments) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": tool, "args": arguments, "id": "1", "type": "tool_call"}])


def agent(model, *middleware, tools=(), saver=None, **options):
    return create_agent(
        model,
        list(tools),
        middleware=[*middleware, PreferenceMiddleware(**options)],
        context_schema=PreferenceContext,
        checkpointer=saver,
        system_prompt="Be kind.",
    )


@pytest.fixture(params=["sync", "async"])
def run(request):
    """Runs an agent in either way."""

    async def run(graph, said, context=None, config=None):
        asked = {"messages": [HumanMessage(said)]} if isinstance(said, str) else said
        if request.param == "sync":
            return graph.invoke(asked, config, context=context)
        return await graph.ainvoke(asked, config, context=context)

    return run


@pytest.fixture
def listening(monkeypatch):
    """What reads preferences out of words: it knows short, long, jokes and grave."""
    inferer = Inferer(WordReadOut(), default_dimensions())
    monkeypatch.setattr(bootstrap, "load_inferer", lambda settings, dimensions: inferer)


# What a model gets


async def test_a_model_that_can_only_read_gets_the_preferences_in_words(people, run):
    people.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    model = Reader()
    reply = (await run(agent(model), QUESTION, ALICE))["messages"][-1]
    system, asked = model.given[0]
    assert system.content.startswith("Be kind.\n\nThe person who asked the question is a nurse on night shifts")
    assert "joke" in system.content
    assert asked.content == QUESTION
    assert reply.response_metadata["prefmw"] == {
        "user": "alice",
        "revision": 2,
        "method": "prompt",
        "strength": None,
        "weights": {"humor": 0.5},
        "notices": [],
    }


async def test_who_wants_no_method_gets_none(people, run):
    people.edit_user("alice", method="none", actor="test")
    model = Reader()
    reply = (await run(agent(model), QUESTION, ALICE))["messages"][-1]
    assert model.given[0][0].content == "Be kind."
    assert (reply.response_metadata["prefmw"]["method"], reply.response_metadata["prefmw"]["weights"]) == ("none", {})


async def test_prefmw_s_own_model_is_steered_at_every_token(chat, people, run):
    said = (await run(agent(chat), QUESTION, ALICE))["messages"][-1]
    alone = chat.invoke([SystemMessage("Be kind."), HumanMessage(QUESTION)], user_id="alice")
    assert said.content == alone.content
    applied = said.response_metadata["prefmw"]
    assert (applied["user"], applied["method"], applied["strength"]) == ("alice", "linear", 2.0)
    assert (await run(agent(chat), QUESTION, BOB))["messages"][-1].content != said.content


def dressed(chat, how: str):
    """The chat model as applications wrap it, each naming Bob where it can."""
    match how:
        case "bound":
            return chat.bind(temperature=0.5)
        case "bound to Bob":
            return chat.bind(user_id="bob")
        case "Bob's config":
            return chat.with_config(configurable={"user_id": "bob"})
        case "Bob's own, bound":
            return chat.model_copy(update={"user_id": "bob"}).bind(temperature=0.5)
        case "retried":
            return chat.with_retry()
        case "fallen back from":
            return chat.with_fallbacks([chat.bind(temperature=0)])
        case "configurable":
            return chat.configurable_fields(user_id=ConfigurableField(id="user_id"))
    raise AssertionError(how)


@pytest.mark.parametrize("client", [{}, {"user_id": "bob"}])
@pytest.mark.parametrize(
    "how",
    ["bound", "bound to Bob", "Bob's config", "Bob's own, bound", "retried", "fallen back from", "configurable"],
)
async def test_the_context_s_user_wins_however_prefmw_s_own_model_is_wrapped(chat, people, run, how, client):
    config = {"configurable": {"thread_id": "1", **client}}
    said = (await run(agent(dressed(chat, how)), QUESTION, ALICE, config))["messages"][-1]
    assert said.response_metadata["prefmw"]["user"] == "alice"
    assert said.response_metadata["prefmw"]["method"] == "linear"
    assert (len(list(people.conversations("alice"))), list(people.conversations("bob"))) == (1, [])


async def test_a_model_that_is_prefmw_s_own_in_some_cases_only_is_refused(chat, people, run):
    with pytest.raises(UsageError, match="ModelFallbackMiddleware"):
        await run(agent(Reader().with_fallbacks([chat])), QUESTION, ALICE)


async def test_an_unknown_user_answered_as_nobody_is_not_the_config_s(chat, people, run):
    config = {"configurable": {"thread_id": "1", "user_id": "bob"}}
    carol = PreferenceContext("carol")
    said = (await run(agent(chat, on_unknown_user="base"), QUESTION, carol, config))["messages"][-1]
    assert said.response_metadata["prefmw"]["user"] is None
    assert list(people.conversations("bob")) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "P"),
        ("Be kind.", "Be kind.\n\nP"),
        (["Be kind."], ["Be kind.", {"type": "text", "text": "\n\nP"}]),
        (
            [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
            [
                {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "\n\nP"},
            ],
        ),
    ],
)
def test_words_stand_behind_a_system_prompt_of_any_form(before, after):
    system = None if before is None else SystemMessage(before, id="7")
    found = with_principle(system, "P")
    assert found.content == after
    assert system is None or (found.id, system.content) == ("7", before)


async def test_it_works_beside_the_built_in_middleware(people, run):
    def weather(place: str) -> str:
        """The weather at a place."""
        return "sunny"

    model = Reader(says=[called("weather", place="town"), "It is sunny."])
    graph = agent(
        model,
        TodoListMiddleware(),
        SummarizationMiddleware(model=Reader(says=["A talk."]), trigger=("messages", 50)),
        ModelCallLimitMiddleware(run_limit=5),
        ModelRetryMiddleware(max_retries=1),
        ToolRetryMiddleware(max_retries=1),
        PIIMiddleware("email"),
        ContextEditingMiddleware(),
        tools=[weather],
        saver=InMemorySaver(),
    )
    for _ in range(2):
        found = await run(graph, "What is the weather? Write to a@example.com", ALICE, THREAD)
        assert found["messages"][-1].content == "It is sunny."
    for messages in model.given:
        blocks = messages[0].content
        assert blocks[0]["text"] == "Be kind."
        assert "write_todos" in blocks[1]["text"]
        assert "nurse" in blocks[2]["text"]
        assert len(blocks) == 3


async def test_a_fallback_is_steered_in_its_own_way(chat, people, run):
    broken = Reader(says=[ConnectionError("gone")])
    graph = agent(broken, ModelFallbackMiddleware(chat))
    said = (await run(graph, QUESTION, ALICE))["messages"][-1]
    assert said.response_metadata["prefmw"]["method"] == "linear"
    assert "nurse" in broken.given[0][0].content


async def test_a_cache_hands_on_no_user(people, run):
    set_llm_cache(InMemoryCache())
    try:
        for user in ("alice", "bob"):
            people.edit_user(user, method="none", actor="test")  # so that both prompts are one
        graph = agent(Reader())
        for context in (ALICE, BOB, ALICE):
            said = (await run(graph, QUESTION, context))["messages"][-1]
            assert said.response_metadata["prefmw"]["user"] == context.user_id
    finally:
        set_llm_cache(None)


# Whom a run is for


@pytest.mark.parametrize("context", [None, {}, {"user_id": None}])
async def test_a_run_that_names_nobody_is_refused(people, run, context):
    model = Reader()
    graph = create_agent(model, [], middleware=[PreferenceMiddleware()])
    with pytest.raises(UsageError, match=r"context=PreferenceContext\(user_id="):
        await run(graph, QUESTION, context)
    assert model.given == []


@pytest.mark.parametrize("user", ["", " x", 3])
async def test_what_is_no_user_id_is_refused(people, run, user):
    with pytest.raises(UsageError, match="user id"):
        await run(agent(Reader()), QUESTION, PreferenceContext(user))


async def test_a_user_in_the_config_is_not_enough(people, run):
    """A client may write the config; the context is the application's."""
    graph = create_agent(Reader(), [], middleware=[PreferenceMiddleware()])
    with pytest.raises(UsageError, match="whom the run is for"):
        await run(graph, QUESTION, None, {"configurable": {"user_id": "alice"}})


async def test_an_application_s_own_context_may_name_the_user(people, run):
    @dataclass
    class Own:
        user_id: str
        tenant: str = "x"

    model = Reader()
    graph = create_agent(model, [], middleware=[PreferenceMiddleware()], context_schema=Own)
    await run(graph, QUESTION, Own("alice"))
    assert "nurse" in model.given[0][0].content


async def test_unknown_users_are_added_refused_or_without_preferences(chat, people, run):
    with pytest.raises(UnknownUserError):
        await run(agent(Reader(), on_unknown_user="raise"), QUESTION, PreferenceContext("carol"))
    for model in (Reader(), chat):
        graph = agent(model, on_unknown_user="base")
        said = (await run(graph, QUESTION, PreferenceContext("carol")))["messages"][-1]
        applied = said.response_metadata["prefmw"]
        assert (applied["user"], applied["method"]) == (None, "none")
    assert len(list(people.users())) == 2
    await run(agent(Reader()), QUESTION, PreferenceContext("carol"))
    assert people.revisions("carol")[0].reason == "first run of an agent"


async def test_two_databases_are_refused(chat, people, run, tmp_path):
    elsewhere = chat.model_copy(update={"database": str(tmp_path / "other.db")})
    with pytest.raises(UsageError, match="two databases"):
        await run(agent(elsewhere), QUESTION, ALICE)


# Threads


async def test_a_thread_taken_over_by_a_second_user_is_refused_and_stays_as_it_was(people, run, listening):
    model, saver = Reader(), InMemorySaver()
    graph = agent(model, saver=saver, learn=True)
    await run(graph, "Short answers, please!", ALICE, THREAD)
    before = graph.get_state(THREAD).values["messages"]
    for said in ("Jokes, please!", {"messages": [HumanMessage("Jokes!"), AIMessage("Ha."), HumanMessage("Jokes!")]}):
        with pytest.raises(ThreadOwnerError, match="another user") as caught:
            await run(graph, said, BOB, THREAD)
        assert "alice" not in str(caught.value)
        assert graph.get_state(THREAD).values["messages"] == before
    assert len(model.given) == 1  # nothing was asked for Bob
    assert people.profile("bob").weights == {}
    await run(graph, "And now?", ALICE, THREAD)
    assert [message.content for message in model.given[-1][1:]] == ["Short answers, please!", "Very well.", "And now?"]
    assert set(people.profile("alice").weights) == {"verbosity"}  # and nothing of Bob's
    assert people.profile("bob").weights == {}


async def test_somebody_else_s_resumption_of_a_refused_run_changes_nothing(people, run, listening):
    model, saver = Reader(), InMemorySaver()
    graph = agent(model, saver=saver, learn=True)
    await run(graph, "Hello.", ALICE, THREAD)
    with pytest.raises(ThreadOwnerError):
        await run(graph, "Jokes, please!", BOB, THREAD)
    with pytest.raises(ThreadOwnerError):
        await run(graph, None, BOB, THREAD)
    found = await run(graph, None, ALICE, THREAD)
    assert [message.content for message in found["messages"]] == ["Hello.", "Very well."]
    assert people.profile("alice").weights == people.profile("bob").weights == {}


async def test_what_swallows_errors_of_models_does_not_hand_a_thread_over(people, run):
    def ring(name: str) -> str:
        """Ring somebody."""
        return "rung"

    saver = InMemorySaver()
    model = Reader(says=[called("ring", name="x"), "Done."])
    graph = agent(
        model,
        ModelRetryMiddleware(max_retries=1, on_failure="continue", initial_delay=0.0),
        HumanInTheLoopMiddleware(interrupt_on={"ring": True}),
        tools=[ring],
        saver=saver,
    )
    await run(graph, "Ring x; my secret is 42.", ALICE, THREAD)  # stops to be approved
    approved = Command(resume={"decisions": [{"type": "approve"}]})
    with pytest.raises(ThreadOwnerError):
        await run(graph, approved, BOB, THREAD)
    assert len(model.given) == 1


async def test_every_thread_has_its_own_owner(people, run):
    graph = agent(Reader(), saver=InMemorySaver())
    await run(graph, "Hello.", ALICE, THREAD)
    await run(graph, "Hello.", BOB, {"configurable": {"thread_id": "2"}})
    await run(graph, "Hello.", ALICE, THREAD)


async def test_the_owner_can_neither_be_given_nor_read(people, run):
    saver = InMemorySaver()
    graph = agent(Reader(), saver=saver)
    found = await run(graph, {"messages": [HumanMessage("Hello.")], "prefmw_owner": "bob"}, ALICE, THREAD)
    assert set(found) == {"messages"}
    assert graph.get_state(THREAD).values["prefmw_owner"] == "alice"
    with pytest.raises(ThreadOwnerError):
        await run(graph, {"messages": [HumanMessage("Hello.")], "prefmw_owner": "bob"}, BOB, THREAD)


@pytest.mark.parametrize("refused", [None, PreferenceContext("alice "), PreferenceContext("zoe")])
async def test_what_a_refused_run_brings_does_not_stay_in_the_thread(people, run, listening, refused):
    model, saver = Reader(), InMemorySaver()
    graph = agent(model, saver=saver, learn=True, on_unknown_user="raise")
    for _ in range(2):  # a thread that is nobody's yet, and one that is Bob's
        with pytest.raises((UsageError, UnknownUserError)):
            await run(graph, "Jokes, please! My secret is 42.", refused, THREAD)
        found = await run(graph, "Hello.", BOB, THREAD)
        assert "secret" not in str([found["messages"], model.given])
    assert people.profile("bob").weights == {}


async def test_a_run_refused_for_a_database_that_fails_leaves_nothing(people, run, monkeypatch):
    graph = agent(Reader(), saver=InMemorySaver())
    await run(graph, "Hello.", ALICE, THREAD)
    tries = iter([StoreError("the disk is full")])

    def fail(*args):
        if error := next(tries, None):
            raise error
        return "alice"

    monkeypatch.setattr(PreferenceMiddleware, "_admitted", fail)
    with pytest.raises(PrefmwError, match="refused.*the disk is full"):
        await run(graph, "My secret is 42.", ALICE, THREAD)
    found = await run(graph, "And now?", ALICE, THREAD)
    assert [message.content for message in found["messages"]] == ["Hello.", "Very well.", "And now?", "Very well."]


def test_what_another_user_s_broken_off_run_brought_is_not_heard_as_the_owner_s(people, listening):
    graph = agent(Reader(), saver=InMemorySaver(), learn=True)
    graph.invoke({"messages": [("user", "Hello.")]}, THREAD, context=ALICE)
    for _ in graph.stream({"messages": [("user", "Jokes, please!")]}, THREAD, context=BOB, stream_mode="values"):
        break
    graph.invoke({"messages": [("user", "Thank you.")]}, THREAD, context=ALICE)
    assert people.profile("alice").weights == {}


# Learning


async def test_nothing_is_learned_unless_that_is_switched_on(people, run, listening):
    await run(agent(Reader()), "Short answers, please!", ALICE)
    assert people.profile("alice").weights == {}


async def test_the_owner_s_new_words_are_learned_once_and_told(people, run, listening):
    graph = agent(Reader(), saver=InMemorySaver(), learn=True)
    found = await run(graph, "Short answers, please!", ALICE, THREAD)
    assert people.profile("alice").weights["verbosity"].value == pytest.approx(-0.98)
    (notice,) = found["messages"][-1].response_metadata["prefmw"]["notices"]
    assert "heard verbosity" in notice
    people.write_weights("alice", {"verbosity": None}, source=Source.learned, actor="alice")  # taken back
    found = await run(graph, "Thank you.", ALICE, THREAD)
    assert people.profile("alice").weights == {}  # and not heard again
    assert found["messages"][-1].response_metadata["prefmw"]["notices"] == []


async def test_words_of_a_run_that_failed_are_not_heard_again(people, run, listening):
    model = Reader(says=[ConnectionError("gone"), "Very well."])
    graph = agent(model, saver=InMemorySaver(), learn=True)
    with pytest.raises(ConnectionError):
        await run(graph, "Short answers, please!", ALICE, THREAD)
    people.write_weights("alice", {"verbosity": None}, source=Source.learned, actor="alice")
    await run(graph, "Jokes, please!", ALICE, THREAD)
    assert set(people.profile("alice").weights) == {"humor"}


async def test_summaries_are_nobody_s_words(people, run, listening):
    summariser = Reader(says=["Long answers and jokes were asked for, grave."])
    graph = agent(
        Reader(),
        SummarizationMiddleware(model=summariser, trigger=("messages", 3), keep=("messages", 1)),
        saver=InMemorySaver(),
        learn=True,
    )
    for said in ("Hello.", "And then?", "And then?", "And then?"):
        await run(graph, said, ALICE, THREAD)
    assert summariser.given != []
    assert people.profile("alice").weights == {}


async def test_prefmw_s_own_model_learns_through_the_middleware(chat, people, run, listening):
    said = (await run(agent(chat, learn=True), "Short answers, please!", ALICE))["messages"][-1]
    applied = said.response_metadata["prefmw"]
    assert (applied["revision"], applied["weights"]) == (2, {"verbosity": pytest.approx(-0.98)})
    assert "heard verbosity" in applied["notices"][0]


@pytest.mark.parametrize(
    ("messages", "seen", "words"),
    [
        ([HumanMessage("a", id="1")], [], "a"),
        ([HumanMessage("a", id="1")], ["1"], None),
        ([HumanMessage("a", id="1"), HumanMessage("b", id="2")], ["1"], "b"),
        ([HumanMessage("a", id="1"), HumanMessage("b", id="2")], [], "b"),
        ([HumanMessage("a", id="1"), AIMessage("x", id="2"), HumanMessage("b", id="3")], [], "b"),
        ([HumanMessage("a", id="1"), AIMessage("x", id="2")], [], None),
        ([HumanMessage("a", id="1", name="researcher"), HumanMessage("b", id="2", name="alice")], [], "b"),
        ([HumanMessage("b", id="2", name="alice"), HumanMessage("a", id="1", name="researcher")], [], None),
        ([HumanMessage("a", id="1", additional_kwargs={"lc_source": "summarization"})], [], None),
        ([HumanMessage([{"type": "text", "text": "a"}, {"type": "image", "url": "x"}], id="1")], [], "a"),
        ([], [], None),
    ],
)
def test_new_words_are_the_user_s_own_in_the_message_that_a_run_begins_with(messages, seen, words):
    assert new_words(messages, seen, "alice") == words


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    import importlib
    import sys

    from prefmw.errors import MissingExtraError

    for module, names in (
        ("prefmw.adapters.middleware", ["langchain.agents.middleware"]),
        ("prefmw.adapters.langgraph_store", ["langgraph.store.base"]),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, module, raising=False)
            for name in names:
                patch.setitem(sys.modules, name, None)
            with pytest.raises(MissingExtraError, match=r"pip install 'prefmw\[agents\]'"):
                importlib.import_module(module)
