"""Dimensions, methods, profiles and the principle text."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmw.errors import UsageError
from prefmw.preferences import (
    METHODS,
    STRENGTHS,
    Profile,
    Source,
    Weight,
    check_method,
    check_persona,
    check_strength,
    check_user_id,
    default_dimensions,
    parse_dimensions,
    principle_text,
)
from prefmw.preferences.anchors import anchor_bank

DIMENSIONS = default_dimensions()
PERSONA = "The person who asked the question is {}, your answer needs to take his(her) needs into account."


def profile(persona="", **weights) -> Profile:
    now = datetime.now(UTC)
    layers = tuple(Weight(key, Source.user, value, 1.0, now) for key, value in weights.items())
    return Profile("alice", persona, 1, layers)


def test_the_registry_holds_the_eight_dimensions():
    assert {key: (d.negative and d.negative.name, d.positive.name, d.kind) for key, d in DIMENSIONS.items()} == {
        "verbosity": ("concise", "detailed", "style"),
        "complexity": ("elementary", "expert", "style"),
        "humor": ("serious", "humorous", "style"),
        "creativity": ("factual", "creative", "style"),
        "friendliness": ("blunt", "warm", "style"),
        "formality": ("casual", "formal", "style"),
        "helpfulness": (None, "helpful", "quality"),
        "harmlessness": (None, "harmless", "quality"),
    }


def test_every_principle_is_one_sentence_of_its_own():
    sentences = [pole.principle for d in DIMENSIONS.values() for pole in (d.negative, d.positive) if pole]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in sentences)


@pytest.mark.parametrize("value", [1.01, -1.01, math.nan, math.inf])
def test_a_weight_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match=r"\[-1, 1\]"):
        DIMENSIONS["verbosity"].check(value)


def test_a_dimension_without_a_negative_pole_starts_at_zero():
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        DIMENSIONS["helpfulness"].check(-0.1)


def test_an_unknown_dimension_suggests_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'humor'"):
        DIMENSIONS.named("humour")


def test_a_registry_is_read_from_toml():
    text = """
[spice]
kind = "style"
negative = { name = "mild", principle = "M." }
positive = { name = "hot", principle = "H." }
"""
    assert parse_dimensions(text)["spice"].pole(-0.1).name == "mild"
    extended = parse_dimensions(text + "[humor]\nretired = true\n", DIMENSIONS)
    assert list(extended) == [*(key for key in DIMENSIONS if key != "humor"), "spice"]


def test_a_dimension_is_replaced_in_its_place():
    text = '[humor]\npositive = { name = "witty", principle = "Be witty.", anchors = ["I love wit."] }\n'
    replaced = parse_dimensions(text, DIMENSIONS)
    assert list(replaced) == list(DIMENSIONS)
    assert (replaced["humor"].low, replaced["humor"].positive.anchors) == (0.0, ("I love wit.",))
    bank = anchor_bank(replaced)
    assert [anchor for anchor in bank if anchor.dimension == "humor"] == [("I love wit.", "humor", 1)]


def test_a_weight_on_a_pole_that_is_gone_asks_for_nothing():
    replaced = parse_dimensions('[humor]\npositive = { name = "witty", principle = "Be witty." }\n', DIMENSIONS)
    assert principle_text(profile(humor=-1.0), replaced) == ""
    assert principle_text(profile(humor=1.0), replaced) == "Be witty."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[spice", "no TOML"),
        ("spice = 1", "is no table"),
        ("[spice]", "no positive pole"),
        ("[humour]\nretired = true", "did you mean"),
        ("[humor]\nretired = false", "more than retired"),
        ('[spice]\nkind = "hot"', "of kind 'hot'"),
        ("[spice]\nheat = 1", "holds 'heat'"),
        ('[spice]\npositive = "hot"', "has a name"),
        ('[spice]\npositive = { name = "", principle = "H." }', "empty text"),
        ('[spice]\npositive = { name = "hot", principle = "H.", anchors = [1] }', "no text"),
        ('[spice]\npositive = { name = "hot", principle = "H.", anchors = "hot" }', "lists of texts"),
        (
            '[spice]\npositive = { name = "hot", principle = "H." }\nnegative = { name = "hot", principle = "M." }',
            "both poles",
        ),
        ("".join(f"[{key}]\nretired = true\n" for key in DIMENSIONS), "no dimension is left"),
    ],
)
def test_a_registry_that_cannot_be_read_says_where(text, said):
    with pytest.raises(UsageError, match=said):
        parse_dimensions(text, DIMENSIONS)


# Principle text


def test_a_persona_stands_in_the_paper_s_words():
    assert principle_text(profile("a night nurse"), DIMENSIONS) == PERSONA.format("a night nurse")


def test_pole_sentences_follow_strongest_first_and_ties_in_the_registry_s_order():
    text = principle_text(profile("x", humor=0.5, verbosity=-0.5, formality=-0.9), DIMENSIONS)
    assert text == (
        PERSONA.format("x") + " Write casually, as to a friend. Keep the answer short and to the point. "
        "Be funny and add a joke or two."
    )


@pytest.mark.parametrize(("value", "said"), [(0.14, False), (-0.14, False), (0.15, True), (-0.15, True), (0.0, False)])
def test_only_telling_weights_are_put_into_words(value, said):
    assert bool(principle_text(profile(humor=value), DIMENSIONS)) == said


def test_qualities_and_retired_dimensions_are_not_put_into_words():
    assert principle_text(profile(helpfulness=1.0, harmlessness=1.0, spice=1.0), DIMENSIONS) == ""


def test_a_persona_of_several_lines_becomes_one_sentence():
    assert principle_text(profile("I cook.\n\nI run."), DIMENSIONS) == PERSONA.format("I cook. I run")


@given(st.dictionaries(st.sampled_from(sorted(DIMENSIONS)), st.floats(-1, 1)), st.randoms())
def test_the_text_does_not_depend_on_the_order_of_the_layers(weights, random):
    shuffled = list(weights.items())
    random.shuffle(shuffled)
    assert principle_text(profile("x", **weights), DIMENSIONS) == principle_text(
        profile("x", **dict(shuffled)), DIMENSIONS
    )


# Strengths


def test_the_strength_table():
    table = {name: dial and (dial.symbol, dial.default, dial.low, dial.high) for name, dial in STRENGTHS.items()}
    assert table == {
        "none": None,
        "prompt": None,
        "linear": ("ratio", 2.0, 0.0, 10.0),
        "drift": ("gain", 1.0, 0.0, 5.0),
        "pad": ("beta", 1.0, 0.0, 3.0),
        "dpa": None,
    }
    assert set(METHODS) == set(STRENGTHS)


@pytest.mark.parametrize(
    ("method", "given", "expected"), [("linear", None, 2.0), ("linear", 0, 0.0), ("none", None, None)]
)
def test_strength_in_force(method, given, expected):
    assert check_strength(method, given) == expected


@pytest.mark.parametrize("strength", [-0.1, 10.1, math.nan, math.inf, -math.inf])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(UsageError, match=r"\[0, 10\]"):
        check_strength("linear", strength)


@pytest.mark.parametrize("method", ["none", "prompt", "dpa"])
def test_a_strength_for_a_method_that_takes_none_is_refused(method):
    with pytest.raises(UsageError, match="takes no strength"):
        check_strength(method, 0.0)


@pytest.mark.parametrize("method", ["liner", "", "LINEAR", "x" * 1000])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(UsageError, match="known: auto, dpa, drift, linear, none, pad, prompt") as caught:
        check_method(method)
    assert len(str(caught.value)) < 200


# Ids and personas


@given(st.text(max_size=150))
def test_a_user_id_is_taken_or_refused_but_never_changed(text):
    try:
        assert check_user_id(text) == text
    except UsageError:
        return
    assert 1 <= len(text) <= 128
    assert text.isprintable()
    text.encode()


def test_a_persona_is_measured_without_the_space_around_it():
    assert check_persona("  " + "x" * 4000 + "\n") == "x" * 4000
    with pytest.raises(UsageError, match="4000 characters, got 4001"):
        check_persona("x" * 4001)


def test_the_strongest_layer_of_each_dimension_is_in_effect():
    now = datetime.now(UTC)
    layers = (Weight("humor", Source.admin, -1.0, 1.0, now), Weight("humor", Source.inferred, 1.0, 0.5, now))
    assert Profile("a", "", 1, layers).weights == {"humor": layers[0]}
