"""Directions: weights as a unit vector, projection into the trained cone, the released prompt, sampling."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefmw.errors import ModelError, UsageError
from prefmw.preferences import DPACard, Message, Profile, Source, Weight, direction_of
from prefmw.preferences.directions import (
    NEAR,
    PRESETS,
    RELEASED,
    angles_of,
    draw_direction,
    from_angles,
    project,
    read_card,
    spread_directions,
    unit,
    with_system,
)

THREE = DPACard("three", ("helpfulness", "verbosity", "humor"), {"verbosity": (-45.0, 20.0), "humor": (-10.0, 60.0)})
WIDE = DPACard("wide", cone={"verbosity": (-45.0, 45.0)})

directions = st.lists(st.floats(-1, 1), min_size=3, max_size=3)


def person(**weights: float) -> Profile:
    now = datetime.now(UTC)
    layers = tuple(Weight(key, Source.user, value, 1.0, now) for key, value in weights.items())
    return Profile("alice", "", 1, layers)


def cosine(ones, others) -> float:
    return sum(a * b for a, b in zip(ones, others, strict=True)) / math.hypot(*ones) / math.hypot(*others)


@pytest.mark.parametrize(
    ("angle", "rating"),
    [
        (0, "helpfulness*100 + verbosity*0"),
        (-15, "helpfulness*97 + verbosity*-26"),
        (-45, "helpfulness*71 + verbosity*-71"),
    ],
)
def test_the_released_prompt_is_the_authors(angle, rating):
    expected = (
        "You are a helpful, respectful, and honest assistant who always responds to the user in a harmless way. Your "
        f"response should maximize weighted rating = {rating}"
    )
    assert PRESETS["Haoxiang-Wang/DPA-v1-Mistral-7B"].prompt(from_angles([angle])) == expected


def test_an_unset_first_attribute_completes_the_others_as_in_the_paper_s_example():
    found = direction_of(person(verbosity=-0.6), RELEASED)
    assert found.asked == pytest.approx((0.8, -0.6))
    assert found.applied == found.asked
    assert found.prompt.endswith("helpfulness*80 + verbosity*-60")


def test_weights_are_a_direction_whatever_their_length():
    found = direction_of(person(helpfulness=0.3, verbosity=-0.3), RELEASED)
    assert found.asked == pytest.approx((math.sqrt(0.5), -math.sqrt(0.5)))


def test_nothing_set_and_verbosity_zero_are_helpfulness_alone():
    assert direction_of(person(), RELEASED).asked == (1.0, 0.0)
    assert direction_of(person(verbosity=0.0), RELEASED).asked == (1.0, 0.0)


def test_a_direction_of_zeros_is_refused():
    with pytest.raises(UsageError, match="a direction of zeros points nowhere"):
        direction_of(person(helpfulness=0.0, verbosity=0.0), RELEASED)


def test_a_direction_outside_the_cone_is_projected_and_says_so():
    found = direction_of(person(verbosity=-1.0), RELEASED)
    assert found.asked == (0.0, -1.0)
    assert angles_of(found.applied) == pytest.approx([-45.0])
    assert found.is_projected
    assert found.as_json()["angles"] == {"verbosity": -45.0}


def test_which_dimension_maps_to_which_attribute_is_data():
    card = DPACard(
        "mapped", ("quality", "length"), {"length": (-60.0, 0.0)}, {"quality": "helpfulness", "length": "verbosity"}
    )
    assert direction_of(person(verbosity=-0.6), card).prompt.endswith("quality*80 + length*-60")


@given(st.floats(-179, 179))
def test_of_two_attributes_projection_cuts_the_angle(angle):
    vector = (math.cos(math.radians(angle)), math.sin(math.radians(angle)))
    below, above = ((abs((angle - edge + 180) % 360 - 180), edge) for edge in (-45.0, 45.0))
    assume(abs(below[0] - above[0]) > 1e-3)
    expected = angle if -45 <= angle <= 45 else min(below, above)[1]
    assert angles_of(project(vector, WIDE))[0] == pytest.approx(expected, abs=1e-3)


@given(directions)
def test_no_direction_of_the_cone_is_nearer_than_the_projection(values):
    assume(math.hypot(*values) > 0.01)
    found = project(unit(values), THREE)
    for angle, (low, high) in zip(angles_of(found), THREE.angles, strict=True):
        assert low - 1e-3 <= angle <= high + 1e-3
    rng = random.Random(0)
    grid = [draw_direction(THREE, rng) for _ in range(300)]
    assert max(cosine(values, one) for one in grid) <= cosine(values, found) + 1e-6


@given(directions)
def test_projecting_twice_changes_nothing(values):
    assume(math.hypot(*values) > 0.01)
    once = project(unit(values), THREE)
    assert project(once, THREE) == pytest.approx(once, abs=1e-6)


def test_directions_are_uniform_in_their_angle():
    """Mean of 4,000 uniform angles in [-45, 0]: within 1 degree of -22.5, false failures below 1 in 10^5."""
    rng = random.Random(0)
    angles = [angles_of(draw_direction(RELEASED, rng))[0] for _ in range(4000)]
    assert all(-45 <= angle <= 1e-9 for angle in angles)
    assert sum(angles) / 4000 == pytest.approx(-22.5, abs=1)


@pytest.mark.parametrize(("centre", "low", "high"), [(-40, -45, -10), (0, -30, 30), (-60, -45, -30), (-89, -45, -45)])
def test_neighbours_lie_near_the_direction_and_inside_the_cone(centre, low, high):
    rng = random.Random(0)
    angles = [angles_of(draw_direction(WIDE, rng, from_angles([centre])))[0] for _ in range(200)]
    assert low - 1e-6 <= min(angles)
    assert max(angles) <= high + 1e-6
    assert all(abs(angle - centre) <= NEAR + 1e-6 for angle in angles) or centre == -89


def test_spread_directions_go_from_the_greatest_angle_down():
    angles = [angles_of(one)[0] for one in spread_directions(WIDE, 10)]
    assert angles == pytest.approx([45, 35, 25, 15, 5, -5, -15, -25, -35, -45])


def test_the_checkpoint_s_prompt_stands_behind_the_conversation_s_own():
    said = [Message("system", "Answer in French."), Message("user", "Hello?")]
    assert with_system(said, "rate it") == [Message("system", "Answer in French.\n\nrate it"), said[1]]


def test_a_card_is_read_back_as_it_was_written(tmp_path):
    card = DPACard("x", THREE.attributes, THREE.cone, targets=((80.0, 20.0, 3.0),), reward="r")
    (tmp_path / "dpa.json").write_text(card.to_json())
    assert read_card(tmp_path) == card
    assert read_card(tmp_path / "nowhere") is None
    (tmp_path / "dpa.json").write_text(card.to_json()[:40])
    with pytest.raises(ModelError, match="is no DPA checkpoint's card, or is cut short"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cone": {"verbosiy": (-45, 0), "verbosity": (-45, 0)}}, "no attribute 'verbosiy': did you mean 'verbosity'"),
        ({"cone": {}}, "the cone has no angles for verbosity"),
        ({"cone": {"verbosity": (10, -10)}}, "the least and then the greatest"),
        ({"cone": {"verbosity": (-95, 0)}}, r"in \(-90, 90\) degrees"),
        ({"template": "no place"}, "holds {rating}"),
        ({"attributes": ("a", "a")}, "each once"),
        ({"term": "{name}"}, "holds {name} and {value}"),
        ({"names": {"humor": "fun"}}, "no attribute 'humor'"),
        ({"condition": "moon"}, "condition is direction or rewards"),
        ({"dimensions": {"humor": "humor"}}, "no attribute 'humor'"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        DPACard("x", **values)


def test_a_card_may_word_its_rating_otherwise():
    card = DPACard("x", template="Be {rating}.", term="{value} * {name}", names={"verbosity": "detailed"}, scale=10)
    assert card.prompt((0.8, -0.6)) == "Be 8 * helpfulness + -6 * detailed."
    worded = replace(card, opposites={"verbosity": "concise"})
    assert worded.prompt((0.8, -0.6)) == "Be 8 * helpfulness + 6 * concise."
    assert worded.prompt((0.8, 0.6)) == card.prompt((0.8, 0.6)) == "Be 8 * helpfulness + 6 * detailed."
    assert worded.prompt((1, -0.01)) == "Be 10 * helpfulness + 0 * detailed."
    assert DPACard.from_json(worded.to_json()) == worded


def test_reward_prompts_name_the_rewards():
    card = DPACard("x", condition="rewards", template="Ratings: {rating}")
    assert card.reward_prompt((81.4, 19.6)) == "Ratings: helpfulness=81, verbosity=20"
    assert replace(card, scale=10).reward_prompt((81.4, 19.6)) == "Ratings: helpfulness=8, verbosity=2"
    assert replace(card, names={"verbosity": "long"}).reward_prompt((81.4, 19.6)) == "Ratings: helpfulness=81, long=20"
