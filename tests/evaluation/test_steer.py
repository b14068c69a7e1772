"""The steering protocol: what is held out stays held out, intervals and controls are what they say, and on the embedded
model a method that steers is seen to steer."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from prefmw.errors import UsageError
from prefmw.evaluation.held_out import KINDS, held_out_items
from prefmw.evaluation.oracles import ORACLES, followed
from prefmw.evaluation.steer import Condition, answer_items, combine_sharpened, conditions, steer_rows
from prefmw.preferences import default_dimensions, principle_text
from prefmw.training.composer import Composer
from prefmw.training.styles import AXES, load_styles, pole_name


@pytest.fixture(scope="module")
def items():
    return list(held_out_items("test", 40))


def test_items_cover_axes_poles_and_kinds_evenly(items):
    assert Counter(item.axis for item in items) == dict.fromkeys(AXES, 40)
    assert set(Counter((item.axis, item.wanted[item.axis], item.kind) for item in items).values()) == {5}
    assert {item.kind for item in items} == set(KINDS)
    assert 0.1 < sum(bool(item.more) for item in items) / len(items) < 0.4


def test_items_ask_in_words_that_training_does_not_hold(items):
    for item in items:
        assert item.question in item.topic.test_questions
        name = pole_name(item.axis, item.wanted[item.axis])
        if item.kind == "unseen":
            named = {pole_name(axis, sign) for axis, sign in item.wanted.items()}
            assert named in map(set, load_styles().unseen_pairs["test"]) or item.topic.unseen_styles["test"] == name
        else:
            words = load_styles().wordings["test"][name]
            assert item.profile.persona in (*words.personas, *words.indirect, *words.requests)
        assert principle_text(item.profile, default_dimensions())


def test_the_same_seed_gives_the_same_items():
    first, again, other = (
        [(item.question, item.profile.persona) for item in held_out_items("dev", 8, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_sharpening_keeps_the_order_of_the_view_with_the_principle():
    logits = torch.randn(3, 7)
    combined = combine_sharpened([logits], torch.tensor([[0.0], [2.0], [5.0]]))
    assert torch.equal(combined.rule, logits)
    assert torch.allclose(combined.logits[1], 3 * logits[1])
    assert torch.equal(combined.logits[0], logits[0])


def test_conditions_name_methods_strengths_and_controls():
    rows = conditions(["none", "linear"], [1.0, 3.0], 0.7, controls=False)
    assert [(row.name, row.strength) for row in rows] == [("none", None), ("linear", 1.0), ("linear", 3.0)]
    names = [row.label for row in conditions(["prompt", "linear"], [], 0.7, controls=True)]
    assert names == ["prompt", "linear 2", "sharpened 2", "shuffled 2", "prompt", "prompt", "best-of-4"]
    with pytest.raises(UsageError):
        conditions(["auto"], [], 0.7, controls=False)
    with pytest.raises(UsageError):
        conditions(["linear"], [11.0], 0.7, controls=False)


@pytest.fixture(scope="module")
def dimensions():
    return default_dimensions()


def test_composed_answers_are_mostly_measured_as_followed(items):
    composer = Composer("test", seed=1)
    hits = [
        followed(ORACLES[item.axis](composer.answer(item.topic, item.wanted).text), item.wanted[item.axis])
        for item in items
    ]
    assert sum(hits) > 0.8 * len(hits)


def test_steering_is_seen_on_the_embedded_model(tiny, dimensions):
    rows = conditions(["none", "prompt", "linear"], [], 0.7, controls=False)
    kept = []
    table = steer_rows(
        "dev", rows, 16, tiny, dimensions, keep=lambda condition, answered: kept.append((condition, answered))
    )
    rate = {row["method"]: row["followed"] for row in table if row["axis"] == "all"}
    assert rate["none"] < rate["prompt"] < rate["linear"]
    assert [row["cost_ratio"] for row in table if row["method"] == "none"] == [1.0] * 6
    line = json.loads(kept[0][1][0].as_json_line(kept[0][0]))
    assert {"text", "wanted", "measures", "followed", "relevant"} <= set(line)


def test_steered_replies_stay_on_topic(tiny, dimensions):
    rows = conditions(["prompt", "linear"], [], 0.7, controls=False)
    table = steer_rows("dev", rows, 16, tiny, dimensions)
    assert all(row["relevance"] >= 0.8 for row in table if row["axis"] == "all")


def test_the_same_seed_gives_the_same_replies(tiny, dimensions):
    chosen = list(held_out_items("dev", 2))
    first, again = (
        [answer.text for answer in answer_items(chosen, Condition("linear", 2.0), tiny, dimensions)[0]]
        for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize("name", ["sharpened", "shuffled", "best-of-4"])
def test_controls_answer(name, tiny, dimensions):
    chosen = list(held_out_items("dev", 2))
    strength = None if name == "best-of-4" else 2.0
    answered, seconds = answer_items(chosen, Condition(name, strength), tiny, dimensions)
    assert len(answered) == 10
    assert all(answer.text for answer in answered)
    assert seconds > 0


def test_what_is_named_twice_is_one_row():
    assert len(conditions(["none", "none"], [], 0.7, controls=False)) == 1
    assert len(conditions(["linear"], [1.0, 1.0], 0.7, controls=False)) == 1
