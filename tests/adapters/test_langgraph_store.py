"""Preferences as LangGraph's long-term memory."""

from __future__ import annotations

from typing import TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import GetOp, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore

from prefmw.adapters.langgraph_store import PreferenceView, namespace_of
from prefmw.errors import UsageError
from prefmw.preferences import Source, Stated

OF_ALICE = ("preferences", "alice")


@pytest.fixture
def view(people):
    people.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    people.write_weights("alice", {"verbosity": Stated(-0.8)}, source=Source.learned, actor="test")
    return PreferenceView()


def test_what_is_set_is_read(view):
    humor = view.get(OF_ALICE, "humor")
    assert humor.value == {"value": 0.5, "source": "user", "confidence": 1.0, "pole": "humorous"}
    assert (humor.key, humor.namespace) == ("humor", OF_ALICE)
    assert view.get(OF_ALICE, "persona").value == {"text": "a nurse on night shifts"}
    assert view.get(OF_ALICE, "formality") is None
    assert view.get(("preferences", "nobody"), "humor") is None


def test_what_is_written_is_the_user_s_own_and_a_revision(view, people):
    view.put(OF_ALICE, "humor", {"value": -0.25})
    weight = people.profile("alice").weights["humor"]
    assert (weight.value, weight.source) == (-0.25, Source.user)
    assert people.revisions("alice")[-1].actor == "langgraph"
    view.put(OF_ALICE, "persona", {"text": "a cook"})
    assert people.profile("alice").persona == "a cook"
    assert view.get(OF_ALICE, "persona").updated_at > view.get(OF_ALICE, "persona").created_at


def test_an_item_that_was_read_may_be_written_back_changed(view, people):
    item = view.get(OF_ALICE, "verbosity")
    view.put(OF_ALICE, "verbosity", {**item.value, "value": 1})
    assert people.profile("alice").weights["verbosity"].source is Source.user
    assert people.profile("alice").weights["verbosity"].value == 1.0


def test_deleting_uncovers_what_lies_beneath(view, people):
    view.put(OF_ALICE, "verbosity", {"value": 1.0})
    view.delete(OF_ALICE, "verbosity")
    assert view.get(OF_ALICE, "verbosity").value["source"] == "learned"
    view.delete(OF_ALICE, "persona")
    assert view.get(OF_ALICE, "persona") is None
    revision = people.profile("alice").revision
    view.delete(OF_ALICE, "formality")  # of what is not there
    view.delete(("preferences", "nobody"), "humor")
    assert people.profile("alice").revision == revision


def test_writing_adds_a_user_whom_nobody_knows(view, people):
    view.put(("preferences", "carol"), "humor", {"value": 1.0})
    assert people.profile("carol").weights["humor"].value == 1.0
    with pytest.raises(UsageError):
        view.put(("preferences", "dave"), "humor", {"value": 2.0})
    assert "dave" not in [profile.user_id for profile in people.users()]


def test_a_search_filters_ranks_and_pages(view):
    assert [item.key for item in view.search(OF_ALICE)] == ["persona", "humor", "verbosity"]
    assert [item.key for item in view.search(OF_ALICE, filter={"source": "user"})] == ["humor"]
    assert [item.key for item in view.search(OF_ALICE, filter={"value": {"$lt": 0}})] == ["verbosity"]
    assert [item.key for item in view.search(OF_ALICE, filter={"value": {"$gte": -1}, "source": "learned"})] == [
        "verbosity"
    ]
    found = view.search(OF_ALICE, query="does she like jokes?")
    assert (found[0].key, found[0].score > 0, found[-1].score) == ("humor", True, 0.0)
    assert view.search(OF_ALICE, query="a nurse")[0].key == "persona"
    assert [item.key for item in view.search(OF_ALICE, limit=1, offset=1)] == ["humor"]
    assert view.search(("preferences", "nobody")) == []


def test_namespaces_are_those_of_the_user_named(view):
    assert view.list_namespaces(prefix=OF_ALICE) == [OF_ALICE]
    assert view.list_namespaces(prefix=OF_ALICE, suffix=("bob",)) == []
    assert view.list_namespaces(prefix=OF_ALICE, max_depth=1) == [("preferences",)]
    assert view.list_namespaces(prefix=("preferences", "nobody")) == []


@pytest.mark.parametrize(
    "across",
    [
        lambda view: view.search(("preferences",)),
        lambda view: view.list_namespaces(prefix=("preferences",)),
        lambda view: view.get(("preferences",), "humor"),
        lambda view: view.list_namespaces(prefix=("preferences", "*")),
        lambda view: view.put(("preferences",), "humor", {"value": 1.0}),
    ],
)
def test_no_call_reads_across_people(view, across):
    with pytest.raises(UsageError, match="whose preferences"):
        across(view)


def test_a_user_id_may_hold_periods_and_is_nobody_else_s(view, people):
    for user in ("a@example.com", "alice.bob"):
        people.add_user(user, actor="test")
        view.put(namespace_of(user), "humor", {"value": 1.0})
        assert people.profile(user).weights["humor"].value == 1.0
        assert view.get(namespace_of(user), "humor").namespace == namespace_of(user)
        assert view.list_namespaces(prefix=namespace_of(user)) == [namespace_of(user)]
    assert len(view.search(OF_ALICE)) == 3
    assert namespace_of("alice") == OF_ALICE


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("humour", {"value": 1.0}, "did you mean 'humor'"),
        ("humor", {"value": 1.5}, r"lies in \[-1, 1\]"),
        ("humor", {"value": float("nan")}, "lies in"),
        ("humor", {"value": "much"}, "'value'"),
        ("humor", {"value": True}, "'value'"),
        ("humor", {}, "'value'"),
        ("humor", ["value"], "'value'"),
        ("humor", 0.5, "'value'"),
        ("humor", {"value": 1.0, "extra": 1}, "'value'"),
        ("persona", {"text": 3}, "'text'"),
        ("persona", {"text": "x" * 5000}, "4000"),
    ],
)
def test_what_is_no_preference_is_refused(view, people, key, value, message):
    revision = people.profile("alice").revision
    with pytest.raises(UsageError, match=message):
        view.put(OF_ALICE, key, value)
    assert people.profile("alice").revision == revision


def test_preferences_do_not_expire_and_what_else_there_is_may(view, people):
    class Expiring(InMemoryStore):
        supports_ttl = True

    both = PreferenceView(rest=Expiring())
    both.put(("notes",), "1", {"text": "x"}, ttl=5)
    assert both.get(("notes",), "1").value == {"text": "x"}
    with pytest.raises(UsageError, match="does not expire"):
        both.put(OF_ALICE, "humor", {"value": 0.25}, ttl=5)
    with pytest.raises(NotImplementedError):
        view.put(OF_ALICE, "humor", {"value": 0.25}, ttl=5)


def test_what_is_no_user_id_has_no_namespace():
    with pytest.raises(UsageError, match="user id"):
        namespace_of(None)


def test_an_unknown_comparison_is_refused(view):
    with pytest.raises(UsageError, match=r"\$eq"):
        view.search(OF_ALICE, filter={"value": {"$like": 1}})


def test_everything_else_is_another_store_s(people):
    rest = InMemoryStore()
    view = PreferenceView(rest=rest)
    view.put(("notes", "alice"), "1", {"text": "x"})
    assert rest.get(("notes", "alice"), "1").value == {"text": "x"}
    assert view.list_namespaces() == [("notes", "alice")]
    with pytest.raises(UsageError, match="rest="):
        PreferenceView().put(("notes", "alice"), "1", {"text": "x"})


async def test_operations_are_done_in_their_order_awaited_or_not(people):
    view = PreferenceView(rest=InMemoryStore())
    ops = [
        PutOp(OF_ALICE, "humor", {"value": 1.0}),
        GetOp(OF_ALICE, "humor"),
        PutOp(("notes",), "1", {"text": "x"}),
        GetOp(("notes",), "1"),
        SearchOp(OF_ALICE, {"source": "user"}),
    ]
    for results in (view.batch(ops), await view.abatch(ops)):
        assert results[1].value["value"] == 1.0
        assert results[3].value == {"text": "x"}
        assert [item.key for item in results[4]] == ["humor"]
    await view.aput(OF_ALICE, "humor", {"value": 0.5})
    assert (await view.aget(OF_ALICE, "humor")).value["value"] == 0.5
    assert (await view.asearch(OF_ALICE, query="jokes"))[0].key == "humor"
    await view.adelete(OF_ALICE, "humor")
    assert await view.alist_namespaces(prefix=OF_ALICE) == [OF_ALICE]


def test_a_graph_s_nodes_reach_it_the_usual_way(view, people):
    class State(TypedDict):
        user: str
        humor: float

    def read(state: State, runtime: Runtime) -> dict:
        return {"humor": runtime.store.get(("preferences", state["user"]), "humor").value["value"]}

    def write(state: State, runtime: Runtime) -> None:
        runtime.store.put(("preferences", state["user"]), "humor", {"value": state["humor"] / 2})

    graph = StateGraph(State).add_node(read).add_node(write)
    graph = graph.add_edge(START, "read").add_edge("read", "write").add_edge("write", END).compile(store=view)
    assert graph.invoke({"user": "alice", "humor": 0.0})["humor"] == 0.5
    assert people.profile("alice").weights["humor"].value == 0.25
