"""Scored replies of the corpus: what helpfulness and verbosity count, on replies made by hand from a topic's facts."""

from __future__ import annotations

import pytest

from prefmw.training.composed_scores import composed_scores, helpfulness, oracle_scores
from prefmw.training.topics import load_topics

TOPICS = {topic.id: topic for topic in load_topics()}
RICE, WIFI = TOPICS["cooking-rice"], TOPICS["home-wifi"]


def advice(index: int, *, reasoned: bool = False, topic=RICE) -> str:
    fact = topic.facts[index]
    return f"Try to {fact.act.plain}, because {fact.reason.plain}." if reasoned else f"Try to {fact.act.plain}."


def test_every_fact_counts_half_as_much_as_the_one_before():
    one, two = advice(0), f"{advice(0)} {advice(1)}"
    assert helpfulness(one, RICE) == 35
    assert helpfulness(two, RICE) == 35 + 17.5


def test_reasons_examples_and_caveats_come_on_top():
    assert helpfulness(advice(0, reasoned=True), RICE) == pytest.approx(35 * 9 / 7)
    half = f"{advice(0, reasoned=True)} {advice(1)}"
    assert helpfulness(half, RICE) == pytest.approx(52.5 * 8 / 7)
    assert helpfulness(f"{advice(0)} {RICE.caveat}", RICE) == 45


def test_what_is_wrong_costs_and_another_topic_is_worth_nothing():
    assert helpfulness(f"{advice(0)} {advice(1)} {advice(2, topic=WIFI)}", RICE) == 52.5 - 25
    assert helpfulness(advice(2, topic=WIFI), RICE) == 0


@pytest.mark.parametrize(("beyond", "toll"), [(0, 0), (4, 0.1), (40, 10)])
def test_reading_costs_beyond_forty_words(beyond, toll):
    text = advice(0)
    filled = " ".join([text, *["well"] * (40 - len(text.split()) + beyond)])
    assert helpfulness(filled, RICE) == pytest.approx(35 - toll)


def test_a_long_answer_is_worth_less_than_one_in_between():
    """Whatever is told: so directions in between want lengths in between."""
    answers = [" ".join(advice(at, reasoned=True) for at in range(count)) for count in (1, 3, 6)]
    brief, middle, long = (oracle_scores(text, RICE) for text in answers)
    assert brief["helpfulness"] < middle["helpfulness"] > long["helpfulness"]
    assert brief["verbosity"] < middle["verbosity"] < long["verbosity"]


def test_the_same_seed_gives_the_same_rows():
    one, other = (list(composed_scores("dev", 12, seed=seed, answers=3)) for seed in (1, 2))
    assert one == list(composed_scores("dev", 12, seed=1, answers=3))
    assert one != other
    assert all(one[at].messages == one[at + 1].messages for at in (0, 1, 3))
    assert all(0 <= score <= 100 for row in one for score in row.scores.values())
