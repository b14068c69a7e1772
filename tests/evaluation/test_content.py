"""Relevance, helpfulness and loops, on replies made by hand from a topic's facts."""

from __future__ import annotations

import pytest

from prefmw.evaluation.content import is_joke, read_content, repeats, sentences
from prefmw.training.topics import load_topics

TOPICS = {topic.id: topic for topic in load_topics()}
RICE, WIFI = TOPICS["cooking-rice"], TOPICS["home-wifi"]


def advice(topic, index: int, level: str = "plain", reason_of: int | None = None) -> str:
    act = getattr(topic.facts[index].act, level)
    if reason_of is None:
        return f"Try to {act}."
    return f"Try to {act}, because {getattr(topic.facts[reason_of].reason, level)}."


@pytest.mark.parametrize("level", ["plain", "simple", "expert"])
def test_every_fact_is_recognised_in_every_wording(level):
    for topic in TOPICS.values():
        for index in range(len(topic.facts)):
            content = read_content(advice(topic, index, level, reason_of=index), topic)
            assert index in content.facts
            assert index in content.reasons
            assert content.relevant
            assert content.wrong == 0


def test_an_answer_about_another_topic_is_not_relevant():
    for index in range(6):
        content = read_content(advice(WIFI, index), RICE)
        assert not content.relevant
        assert content.helpfulness == 0


def test_a_refusal_is_not_relevant():
    assert not read_content("I only know everyday topics, such as cooking rice and home wifi.", RICE).relevant


def test_helpfulness_grows_with_facts_reasons_and_examples():
    one = advice(RICE, 0)
    two = f"{one} {advice(RICE, 1)}"
    reasoned = f"{advice(RICE, 0, reason_of=0)} {advice(RICE, 1, reason_of=1)}"
    full = f"{reasoned} {advice(RICE, 2, reason_of=2)} {RICE.caveat}"
    scores = [read_content(text, RICE).helpfulness for text in (one, two, reasoned, full)]
    assert scores == [25, 50, 65, 100]


def test_what_is_wrong_costs():
    right = f"{advice(RICE, 0, reason_of=0)} {advice(RICE, 1)}"
    act, reason = RICE.facts[1].act.plain, RICE.facts[3].reason.plain
    wrong = {
        "another fact's reason": f"{advice(RICE, 0, reason_of=0)} {advice(RICE, 1, reason_of=3)}",
        "in a sentence of its own": f"{advice(RICE, 0, reason_of=0)} {advice(RICE, 1)} This helps because {reason}.",
        "another topic's advice": f"{right} {advice(WIFI, 2)}",
        "the advice turned round": f"{advice(RICE, 0, reason_of=0)} {advice(RICE, 2)} Never {act}.",
    }
    for name, text in wrong.items():
        content = read_content(text, RICE)
        assert content.wrong == 1, name
        assert content.relevant
        assert content.helpfulness < read_content(right, RICE).helpfulness, name


def test_telling_a_fact_twice_counts_once():
    assert read_content(f"{advice(RICE, 0)} {advice(RICE, 0, 'simple')}", RICE).facts == (0,)


def test_jokes_of_the_topics_are_known_and_advice_is_none():
    for topic in TOPICS.values():
        for fact in topic.facts:
            assert is_joke(fact.joke)
    assert not is_joke("Rinse the rice in cold water until it runs clear.")


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("Rinse the rice. Then cook it.", False),
        ("It is good to be here. It is good to be here.", True),
        ("a b c d x a b c d y a b c d", True),
        ("a b c d x a b c d", False),
        ("", False),
    ],
)
def test_loops_are_seen(text, loops):
    assert repeats(text) is loops


def test_sentences_are_cut_behind_their_marks():
    assert sentences("Go. Now! Why? Yes") == ["Go.", "Now!", "Why?", "Yes"]
