"""The baselines' numbers beside a count by hand, of 20 replies of the embedded model.

Somebody read them with the measures' definitions at hand and not their verdicts: has the reply the pole asked for,
does it answer the question, does it say a thing twice.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from prefmw.evaluation.held_out import Item, profile_of
from prefmw.evaluation.steer import Condition, read_replies, row_of
from prefmw.training.topics import load_topics

COUNTED = [json.loads(line) for line in (Path(__file__).parent / "hand_counted.jsonl").read_text().splitlines()]
TOPICS = {topic.id: topic for topic in load_topics()}


def items():
    for one in COUNTED:
        wanted = {one["axis"]: one["wanted"]}
        yield Item(
            TOPICS[one["topic"]], one["question"], one["more"], profile_of(wanted), one["axis"], wanted, "persona"
        )


@pytest.fixture(scope="module")
def answered():
    return read_replies(list(items()), [one["text"] for one in COUNTED], Condition("prompt"))


def test_twenty_replies_of_baselines_were_counted():
    assert len(COUNTED) == 20
    assert set(Counter(one["axis"] for one in COUNTED)) == {
        *("verbosity", "complexity", "humor", "friendliness", "formality")
    }
    assert {"none", "prompt", "sharpened", "shuffled", "best-of-4"} == {one["method"] for one in COUNTED}
    for what in ("followed", "relevant", "loops"):
        assert 0 < sum(one[what] for one in COUNTED) < 20


def test_each_reply_is_measured_as_it_was_counted(answered):
    for one, measured in zip(COUNTED, answered, strict=True):
        assert (measured.followed, measured.relevant, measured.repeats) == (
            one["followed"],
            one["relevant"],
            one["loops"],
        ), one["text"]


def test_a_table_s_row_is_the_count(answered):
    for method in dict.fromkeys(one["method"] for one in COUNTED):
        ours = [index for index, one in enumerate(COUNTED) if one["method"] == method]
        row = row_of(Condition(method), "all", [answered[index] for index in ours])
        assert row["n"] == len(ours)
        for key, what in (("followed", "followed"), ("relevance", "relevant"), ("repetition", "loops")):
            assert row[key] == pytest.approx(sum(COUNTED[index][what] for index in ours) / len(ours), abs=1e-4)
        assert row["ci95"][0] <= row["followed"] <= row["ci95"][1]
