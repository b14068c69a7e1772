"""From choices between replies to stored weights."""

from __future__ import annotations

import numpy as np
import pytest

from prefmw.choices import Choice, differences, instructive_pair, learn_from_choices, score_choices
from prefmw.decoding import Sampling
from prefmw.errors import UsageError
from prefmw.preferences import Feedback, Message, RecordedFeedback, Source, Stated, default_dimensions
from prefmw.preferences.learning import bradley_terry
from prefmw.scoring import Scale, scored_dimensions

KEYS = ("humor", "formality")
STYLES = scored_dimensions(default_dimensions())
SCALE = Scale(STYLES, np.zeros(len(STYLES)), np.full(len(STYLES), 0.01))
QUESTION = (Message("user", "How do I fall asleep faster?"),)


@pytest.fixture
def people(store):
    store.add_user("alice", actor="test")
    return store


def choose(store, humor, formality=0.0, times=1):
    for _ in range(times):
        scores = {"humor": (humor, 0.0), "formality": (formality, 0.0)}
        store.add_feedback(Feedback("alice", "choice", "Why?", chosen="A.", rejected="B.", scores=scores))


def learn(store):
    return learn_from_choices(store, "alice", KEYS, actor="test", reason="chosen")


def test_fewer_than_three_choices_change_nothing(people):
    choose(people, humor=2.0, times=2)
    lesson = learn(people)
    assert (lesson.learned, lesson.choices) == (None, 2)
    assert people.profile("alice").revision == 1


def test_what_is_chosen_again_and_again_is_learned_with_its_evidence(people):
    choose(people, humor=2.0, times=6)
    lesson = learn(people)
    assert lesson.stored == ("humor",)
    assert lesson.accuracy == 1
    weight = people.profile("alice").weights["humor"]
    assert (weight.source, weight.evidence["choices"]) == (Source.learned, 6)
    assert weight.value > 0.3
    assert weight.evidence["interval"][0] > 0
    assert "formality" not in people.profile("alice").weights


def test_choices_that_contradict_each_other_teach_nothing_and_take_back_what_was_learned(people):
    choose(people, humor=2.0, times=4)
    assert learn(people).stored == ("humor",)
    choose(people, humor=-2.0, times=4)
    assert learn(people).stored == ()
    assert "humor" not in people.profile("alice").weights


def test_of_several_thumbs_for_a_reply_the_latest_counts(people):
    rows = [
        RecordedFeedback("alice", kind, "Why?", scores={"humor": pair}, turn_id=7, id=number)
        for number, (kind, pair) in enumerate((("like", (2.0, 0.0)), ("like", (2.0, 0.0)), ("dislike", (0.0, 2.0))))
    ]
    edit = RecordedFeedback("alice", "edit", "Why?", scores={"humor": (1.0, 0.0)}, turn_id=7, id=9)
    assert differences([*rows, edit], KEYS).tolist() == [[-2.0, 0.0], [1.0, 0.0]]


def test_a_dimension_that_came_later_leaves_earlier_choices_in_force(people):
    choose(people, humor=2.0, times=4)
    lesson = learn_from_choices(people, "alice", (*KEYS, "novel"), actor="test", reason="chosen")
    assert lesson.stored == ("humor",)


def test_a_choice_without_a_reply_is_refused(backend):
    with pytest.raises(UsageError, match="names a reply"):
        score_choices("alice", [Choice("like", QUESTION)], backend, default_dimensions(), SCALE)


def test_a_scale_of_other_dimensions_is_refused(backend):
    other = Scale(("humor",), np.zeros(1), np.ones(1))
    with pytest.raises(UsageError, match="other dimensions"):
        score_choices("alice", [Choice("like", QUESTION, "A.")], backend, default_dimensions(), other)


def test_what_was_learned_from_words_stays(people):
    heard = Stated(-0.8, 0.8, {"quote": "no jokes, please"})
    people.write_weights("alice", {"humor": heard}, source=Source.learned, actor="test")
    choose(people, humor=2.0, times=4)
    assert learn(people).stored == ()
    assert people.profile("alice").weights["humor"].value == -0.8


def test_a_person_s_own_word_covers_what_choices_say(people):
    people.write_weights("alice", {"humor": Stated(-0.5)}, source=Source.user, actor="test")
    choose(people, humor=2.0, times=6)
    learn(people)
    assert people.profile("alice").weights["humor"].value == -0.5


def test_feedback_that_was_not_scored_is_left_out(people):
    people.add_feedback(Feedback("alice", "like", "Why?", chosen="A."))
    choose(people, humor=1.0)
    assert differences(people.feedback("alice"), KEYS).tolist() == [[1.0, 0.0]]


def test_a_thumb_is_compared_with_an_average_reply(people, backend):
    like, dislike, both = score_choices(
        "alice",
        [
            Choice("like", QUESTION, chosen="Count sheep."),
            Choice("dislike", QUESTION, rejected="Count sheep."),
            Choice("choice", QUESTION, "Count sheep.", "Read a dull book until you nod off."),
        ],
        backend,
        default_dimensions(),
        SCALE,
    )
    for key in STYLES:
        assert like.scores[key][1] == dislike.scores[key][0] == 0
        assert like.scores[key][0] == pytest.approx(dislike.scores[key][1], abs=1e-3)
        assert like.scores[key][0] == pytest.approx(both.scores[key][0], abs=1e-3)
    assert (like.chosen, like.rejected, dislike.chosen) == ("Count sheep.", "", "")


def test_the_pair_that_is_asked_about_is_two_different_replies_the_same_for_a_seed(people, backend):
    known = bradley_terry(np.zeros((1, len(STYLES))))
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=None, max_tokens=12, seed=3)
    ask = (QUESTION, people.profile("alice"), known, backend, default_dimensions(), SCALE, sampling)
    one, other = instructive_pair(*ask)
    assert one != other
    assert (one, other) == instructive_pair(*ask)
