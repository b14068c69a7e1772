"""Why a reply reads as it does: the probabilities are the model's own, and what no preference touched is unchanged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from prefmw.bootstrap import close_engines, load_backend
from prefmw.errors import UsageError
from prefmw.explanation import explain, explain_turn, find_turn
from prefmw.personalizer import Personalizer
from prefmw.plans import Defaults, Options
from prefmw.preferences import Message, Source, Stated, default_dimensions
from prefmw.settings import load_settings
from prefmw.steering import build_request

QUESTION = [Message("user", "How do I fall asleep faster?")]
METHODS = ["prompt", "linear", "drift", "pad"]


@pytest.fixture(scope="module")
def guided():
    """`tiny` as the settings load it, with its PersRM."""
    yield load_backend(load_settings({"model": "tiny"}))
    close_engines()


@pytest.fixture
def make(store, guided):
    store.add_user("bob", persona="a retired teacher who loves a good joke", actor="test")
    weights = {"humor": Stated(1.0), "verbosity": Stated(0.5)}
    store.write_weights("bob", weights, source=Source.user, actor="test")
    return lambda: Personalizer(store, lambda: guided, default_dimensions(), Defaults(has_persrm=True, max_tokens=60))


def turn_of(store, make, **options):
    make().reply("bob", QUESTION, Options(seed=4, **options))
    return find_turn(store, "bob", None)


@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_are_the_reply_s(method, store, make, guided):
    turn, messages = turn_of(store, make, method=method)
    found = explain_turn(turn, messages, guided)
    assert found.text == turn.text
    assert [step.said.token for step in found.steps if not step.said.end] == list(turn.token_ids)
    assert found.steps[-1].said.end == (turn.finish_reason == "stop")
    assert found.weights == {"humor": 1.0, "verbosity": 0.5}


@pytest.mark.parametrize("method", METHODS)
def test_plain_is_the_model_without_the_preference(method, store, make, guided):
    turn, messages = turn_of(store, make, method=method)
    found = explain_turn(turn, messages, guided)
    context = guided.chat.template.encode(QUESTION)
    (read,) = guided.engine.log_probabilities([(context, list(turn.token_ids))])
    plain = [step.said.plain for step in found.steps][: len(read)]
    assert plain == pytest.approx(read.tolist(), abs=0.01)


def test_under_prompting_aligned_is_the_model_with_the_principle(store, make, guided):
    turn, messages = turn_of(store, make, method="prompt")
    found = explain_turn(turn, messages, guided)
    (view,) = build_request(found.plan, QUESTION, guided.chat).views
    (read,) = guided.engine.log_probabilities([(view.context, list(turn.token_ids))])
    assert [step.said.aligned for step in found.steps][: len(read)] == pytest.approx(read.tolist(), abs=0.01)


def test_no_preference_changes_nothing(store, make, guided):
    turn, messages = turn_of(store, make, method="none")
    found = explain_turn(turn, messages, guided)
    assert all(step.said.change == pytest.approx(0, abs=1e-4) and step.moved < 1e-4 for step in found.steps)


def test_a_turn_of_dials_by_another_rule_is_not_explained(store, make, guided):
    turn, messages = turn_of(store, make, method="drift")
    former = {
        key: {"weight": dial["weight"], "principle": dial["principle"]} for key, dial in turn.plan["dials"].items()
    }
    with pytest.raises(UsageError, match="dials of an earlier version"):
        explain_turn(replace(turn, plan={**turn.plan, "dials": former}), messages, guided)


def test_a_joke_is_made_likelier_by_humour(store, make, guided):
    turn, messages = turn_of(store, make, method="linear")
    found = explain_turn(turn, messages, guided)
    first = found.most_changed(1)[0]
    assert first.said.change > math.log(5)
    assert 0.3 < first.moved <= 1.0
    assert first.said.token in [one.token for one in first.alternatives]
    assert first.plain_favourite.plain == max(one.plain for one in first.alternatives)
    assert [one.aligned for one in first.alternatives] == sorted([one.aligned for one in first.alternatives])[::-1]


def test_the_json_holds_every_token_with_its_alternatives(store, make, guided):
    turn, messages = turn_of(store, make, method="linear")
    found = explain_turn(turn, messages, guided).as_json()
    assert "".join(token["text"] for token in found["tokens"]) == turn.text == found["text"]
    for token in found["tokens"]:
        assert token["change"] == pytest.approx(token["aligned"] - token["plain"], abs=2e-4)
        assert 5 <= len(token["alternatives"]) <= 11


def test_a_reply_of_a_longer_conversation_is_read_in_it(store, make, guided):
    personalizer = make()
    first = personalizer.reply("bob", QUESTION, Options(seed=1, method="linear"))
    more = [*QUESTION, Message("assistant", first.text), Message("user", "And if I wake at four?")]
    reply = personalizer.reply("bob", more, Options(seed=1, method="linear"), conversation_id=first.conversation_id)
    turn, messages = find_turn(store, "bob", None)
    assert messages == more
    found = explain_turn(turn, messages, guided)
    direct = explain(reply.plan, more, reply.token_ids, reply.finish_reason == "stop", guided)
    assert [step.as_json() for step in found.steps] == [step.as_json() for step in direct.steps]
    assert find_turn(store, "bob", first.turn_id)[1] == QUESTION


def test_a_reply_asked_for_again_does_not_read_the_one_it_replaces(store, make):
    personalizer = make()
    first = personalizer.reply("bob", QUESTION, Options(seed=1))
    with personalizer.stream(
        "bob", QUESTION, Options(seed=2), conversation_id=first.conversation_id, replaces=first.turn_id
    ) as stream:
        list(stream)
    assert find_turn(store, "bob", stream.reply.turn_id)[1] == QUESTION


def test_a_stop_string_is_no_token(store, make, guided):
    turn, messages = turn_of(store, make, method="linear", stop=("bed",))
    assert turn.finish_reason == "stop"
    found = explain_turn(turn, messages, guided)
    assert not found.steps[-1].said.end


def test_what_cannot_be_explained_is_said(store, make, guided, backend):
    with pytest.raises(UsageError, match="'bob' has no turn yet"):
        find_turn(store, "bob", None)
    turn, messages = turn_of(store, make, method="pad")
    with pytest.raises(UsageError, match="no turn 99"):
        find_turn(store, "bob", 99)
    with pytest.raises(UsageError, match="made by 'tiny'"):
        explain_turn(turn, messages, backend)
    with pytest.raises(UsageError, match="tokens of context"):
        explain_turn(turn, [Message("system", "Be kind."), *messages], guided)
    other = type(turn)(**{**vars(turn), "plan": {**turn.plan, "persrm": "other@1"}})
    with pytest.raises(UsageError, match=r"guided by the PersRM other@1"):
        explain_turn(other, messages, guided)
    edited = type(turn)(**{**vars(turn), "finish_reason": "edited", "replaces": 7})
    with pytest.raises(UsageError, match=r"the reply that it stands for is turn 7"):
        explain_turn(edited, messages, guided)


def test_nobody_reads_another_user_s_turn(store, make):
    turn, _ = turn_of(store, make)
    store.add_user("eve", actor="test")
    with pytest.raises(UsageError, match=f"'eve' has no turn {turn.id}"):
        find_turn(store, "eve", turn.id)
