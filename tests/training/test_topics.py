"""The topics can be composed into sentences: form, register, and nothing that a composer adds by itself."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from prefmw.training import Topic, load_topics
from prefmw.training.styles import POLES
from prefmw.training.topics import DOMAINS

TOPICS = load_topics()
STYLE_MARKERS = re.compile(
    r"\b(just|please|friend|honestly|kindly|advisable|yeah|proud|excuses)\b", re.IGNORECASE
)  # a composer's own
MARKS = re.compile(r"[;:()\[\]\"“”‘’—–*_]")
CONTRACTION = re.compile(r"\b(\w+n't|I'm|\w+'(re|ll|ve))\b")


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9'%-]+", text)


def every_question(topic: Topic) -> list[str]:
    further = [question for questions in topic.further.values() for question in questions]
    return [*topic.questions, *topic.dev_questions, *topic.test_questions, *topic.followups, *further]


def graded(topic: Topic):
    for fact in topic.facts:
        yield from ((fact.act, 3, 12), (fact.reason, 4, 14))


@pytest.fixture(params=TOPICS, ids=lambda topic: topic.id)
def topic(request) -> Topic:
    return request.param


def test_there_are_topics_enough_in_every_domain():
    count = Counter(topic.domain for topic in TOPICS)
    assert set(count) == set(DOMAINS)
    assert min(count.values()) >= 16
    assert len({topic.id for topic in TOPICS}) == len(TOPICS) >= 80


def test_no_question_is_asked_in_two_topics():
    asked = Counter(question.lower() for topic in TOPICS for question in every_question(topic))
    assert [question for question, count in asked.items() if count > 1] == []


def test_a_topic_has_its_parts(topic):
    assert (len(set(topic.followups)), len(topic.facts)) == (4, 6)
    assert len(set(every_question(topic))) == len(every_question(topic)) >= 64
    assert set(topic.unseen_styles) == {"dev", "test"}
    assert set(topic.unseen_styles.values()) < {pole for pair in POLES.values() for pole in pair}
    assert topic.caveat.endswith(".")
    for question in every_question(topic):
        assert question[0].isupper()
        assert question[-1] in "?.!"


def test_acts_and_reasons_fit_any_frame(topic):
    for part, low, high in graded(topic):
        for text, shortest, longest in ((part.plain, low, high), (part.simple, low, high), (part.expert, 5, 16)):
            assert shortest <= len(words(text)) <= longest, text
            assert text[-1] not in ".!?,", text
            assert not text[0].isupper() or text.split()[0].isupper() or text.split()[0] == "English", text
            assert not CONTRACTION.search(text), text
    for fact in topic.facts:
        for act in (fact.act.plain, fact.act.simple, fact.act.expert):
            assert act.split()[0] not in {"don't", "never", "not", "to", "do"}, act
        for reason in (fact.reason.plain, fact.reason.simple, fact.reason.expert):
            assert reason.split()[0] not in {"because", "since", "as", "so"}, reason


def test_expert_wording_is_measurably_expert(topic):
    for fact in topic.facts:
        simple, expert = (
            words(getattr(fact.act, level) + " " + getattr(fact.reason, level)) for level in ("simple", "expert")
        )
        assert sum(map(len, expert)) / len(expert) >= sum(map(len, simple)) / len(simple) + 1.2


def test_facts_begin_with_different_verbs(topic):
    assert len({fact.act.plain.split()[0] for fact in topic.facts}) == 6


def test_no_style_is_in_the_content_itself(topic):
    neutral = [*every_question(topic), topic.caveat, *(fact.example for fact in topic.facts)]
    for part, *_ in graded(topic):
        neutral += [part.plain, part.simple, part.expert]
    for text in neutral:
        assert not STYLE_MARKERS.search(text), text
        assert not MARKS.search(text), text


def test_jokes_are_one_short_sentence(topic):
    for fact in topic.facts:
        assert 4 <= len(words(fact.joke)) <= 16
        assert fact.joke[-1] in ".!?"
        assert not MARKS.search(fact.joke)
