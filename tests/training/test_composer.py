"""The corpus: what training never sees, what a request does to an answer, and that the text reads as text."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from prefmw.evaluation.content import read_content, repeats
from prefmw.training.composer import FOLLOW_RATE, Composer
from prefmw.training.styles import AXES, POLES, SPLITS, load_styles, load_talk, pole_name
from prefmw.training.topics import load_topics

TOPICS = {topic.id: topic for topic in load_topics()}


@pytest.fixture(scope="module")
def chats():
    return list(Composer("train", seed=4).chats(3000))


@pytest.fixture(scope="module")
def training_text(chats) -> str:
    return "\n".join(message.content for chat in chats for message in chat.messages).lower()


def test_the_same_seed_gives_the_same_chats_and_another_seed_others():
    first, again, other = (list(Composer("train", seed=seed).chats(20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_chats_end_with_an_answer_and_roles_alternate(chats):
    for chat in chats:
        roles = [message.role for message in chat.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(chat.answers) == len(roles) // 2
        assert all(message.content.strip() for message in chat.messages)


def test_every_topic_and_every_pole_occurs(chats):
    topics = Counter(answer.topic for chat in chats for answer in chat.answers)
    assert set(TOPICS) <= set(topics)
    poles = Counter(pole_name(axis, sign) for chat in chats for a in chat.answers for axis, sign in a.asked.items())
    assert set(poles) == {pole for pair in POLES.values() for pole in pair}


def test_no_held_out_question_is_trained_on(training_text):
    for topic in TOPICS.values():
        for question in (*topic.dev_questions, *topic.test_questions, *topic.further["dev"], *topic.further["test"]):
            assert question not in (*topic.questions, *topic.further["train"])
            assert question.lower() not in training_text


def test_no_held_out_wording_is_trained_on(training_text):
    for split in ("dev", "test"):
        for wordings in load_styles().wordings[split].values():
            further = (*wordings.further_personas, *wordings.further_indirect)
            for text in (*wordings.requests, *wordings.personas, *wordings.indirect, *further):
                if len(text.split()) >= 4:  # "Be brief." may stand within another sentence
                    assert text.lower() not in training_text, text


def test_no_held_out_marker_is_trained_on(training_text):
    def leaves(table):
        for key, value in table.items():
            if isinstance(value, dict):
                yield from leaves(value)
            elif key in ("dev", "test"):
                yield from value

    for marker in leaves(load_styles().markers):
        if "{" not in marker:
            assert marker.lower() not in training_text, marker


def test_training_never_asks_for_a_held_out_pair_or_a_topics_unseen_style(chats):
    pairs = load_styles().unseen_pairs
    for chat in chats:
        for answer in chat.answers:
            named = {pole_name(axis, sign) for axis, sign in answer.asked.items()}
            assert not any(pair <= named for pair in (*pairs["dev"], *pairs["test"]))
            if answer.topic:
                assert not named & set(TOPICS[answer.topic].unseen_styles.values())


def test_a_tenth_of_the_question_wordings_is_held_out_for_each_split():
    for topic in TOPICS.values():
        total = len(topic.questions) + len(topic.dev_questions) + len(topic.test_questions)
        assert len(topic.dev_questions) == len(topic.test_questions) == round(0.1 * total) >= 6
        held_out = round(0.1 * sum(map(len, topic.further.values())))
        assert len(topic.further["dev"]) == len(topic.further["test"]) == held_out >= 16
    unseen = Counter(pole for topic in TOPICS.values() for pole in topic.unseen_styles.values())
    assert sum(unseen.values()) == 2 * len(TOPICS)
    assert min(unseen.values()) >= 10


@pytest.mark.parametrize("axis", AXES)
def test_a_tenth_and_more_of_each_poles_wordings_is_held_out(axis):
    for pole in POLES[axis]:
        by_split = {split: load_styles().wordings[split][pole] for split in SPLITS}
        for kind in ("requests", "personas", "indirect", "further_personas", "further_indirect"):
            sets = {split: set(getattr(wordings, kind)) for split, wordings in by_split.items()}
            total = sum(map(len, sets.values()))
            assert len(set().union(*sets.values())) == total
            assert min(len(sets["dev"]), len(sets["test"])) >= 0.14 * total


def test_what_is_asked_is_followed_at_the_rate_that_was_fixed():
    composer = Composer("train", seed=1)
    topic = TOPICS["cooking-rice"]
    drawn = [composer.answer(topic, {"humor": 1}).drawn["humor"] for _ in range(600)]
    # Per answer the mean of two points or so. Its standard error is below 0.02: five of them, so one failure in 10^6.
    assert sum(drawn) / len(drawn) == pytest.approx(FOLLOW_RATE, abs=0.1)
    plain = [composer.answer(topic, {}).drawn["humor"] for _ in range(600)]
    assert sum(plain) / len(plain) == pytest.approx(0.0, abs=0.06)


def test_an_answer_tells_facts_of_its_topic_with_their_own_reasons(chats):
    told = wrong = 0
    for answer in islice((answer for chat in chats for answer in chat.answers if answer.drawn), 800):
        content = read_content(answer.text, TOPICS[answer.topic])
        assert content.relevant, answer.text
        wrong += content.wrong
        told += len(content.facts)
    assert told > 1200
    assert wrong < 0.01 * told  # neighbouring topics share an advice or two


def test_sources_are_whole_sentences_of_the_data_files(chats):
    questions = {q for topic in TOPICS.values() for q in (*topic.questions, *topic.further["train"])}
    met = 0
    for chat in chats[:500]:
        assert len(chat.sources) == len(chat.messages)
        for message, texts in zip(chat.messages, chat.sources, strict=True):
            assert message.role != "assistant" or not texts
            met += bool(questions & set(texts))
    assert met > 300


def test_what_people_say_of_themselves_may_ask_for_nothing(chats):
    neutral = load_talk().neutral
    systems = [
        (message.content, chat.answers[0].asked)
        for chat in chats
        for message in chat.messages
        if message.role == "system"
    ]
    told = [bool(asked) for text, asked in systems if any(said in text for said in neutral)]
    assert min(told.count(False), told.count(True)) > 20


def test_asked_what_a_question_is_about_it_names_the_topic():
    composer = Composer("train", seed=2)
    named = [composer.topic_chat().answers[0] for _ in range(200)]
    assert all((answer.topic is None) == ("none of" in answer.text or "beyond" in answer.text) for answer in named)
    assert all(TOPICS[answer.topic].title in answer.text for answer in named if answer.topic)


def test_answers_do_not_loop(chats):
    answers = [answer.text for chat in chats for answer in chat.answers if answer.drawn]
    assert sum(map(repeats, answers)) <= 0.01 * len(answers)


def test_later_turns_tell_what_was_not_told_before(chats):
    told = Counter()
    for chat in chats[:1000]:
        seen: dict[str, set[int]] = {}
        for answer in chat.answers:
            if answer.drawn:
                facts = set(read_content(answer.text, TOPICS[answer.topic]).facts)
                told[bool(facts & seen.setdefault(answer.topic, set()))] += 1
                seen[answer.topic] |= facts
    assert told[True] < 0.03 * told[False]  # a topic left and taken up again may repeat itself


def test_answers_are_clean_text(chats):
    for chat in chats:
        for answer in chat.answers:
            assert not re.search(r"[{}]|\s\s|\.\.|,,| [,.!?]|[.!?][A-Za-z]", answer.text), answer.text
            assert answer.text[0].isupper()
            assert answer.text[-1] in ".!?"


def test_unknown_questions_share_no_wording_between_splits():
    for key in ("questions", "nouns"):
        parts = [set(load_talk().unknown[key][split]) for split in SPLITS]
        assert sum(map(len, parts)) == len(set().union(*parts))
