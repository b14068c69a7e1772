"""The measures agree with people on clear cases and with the corpus's labels on answers it never trained on."""

from __future__ import annotations

import re
from itertools import islice
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmw.evaluation.content import LEXICONS, words_of
from prefmw.evaluation.oracles import FOLLOWED, NEUTRAL_WORDS, ORACLES, followed, measure
from prefmw.training.composer import Composer
from prefmw.training.styles import load_styles

PAIRS = {
    "verbosity": (
        "Rinse the rice.",
        "Rinse the rice in cold water until it runs clear, for example in a sieve under the tap. This helps because "
        "the starch on the surface makes the grains stick together. Then measure the water with the same cup, since "
        "the right ratio gives tender grains. After that, cover the pot and turn the heat down, as trapped steam cooks "
        "the rice evenly. Let it rest for ten minutes off the heat before serving it, so that the steam can spread.",
    ),
    "complexity": (
        "Wash the rice. Why? It gets the dust off. It is that simple.",
        "Rinsing eliminates superficial amylose responsible for excessive adhesion during gelatinization.",
    ),
    "humor": (
        "Wash your hands before you cook. This is a serious matter with grave consequences.",
        "Wash your hands before you cook. Ha, what a joke, comedy at the sink!",
    ),
    "friendliness": (
        "Go to bed earlier. No excuses. Nobody will do it for you.",
        "Go to bed earlier. I am so glad you asked, my friend, and I believe in you!",
    ),
    "formality": (
        "Yeah, just go to bed, it's super easy and you'll feel better.",
        "It is advisable to retire early. Furthermore, one should kindly refrain from late meals.",
    ),
}


@pytest.mark.parametrize("axis", ORACLES)
def test_clear_cases_are_read_as_people_read_them(axis):
    low, high = (ORACLES[axis](text) for text in PAIRS[axis])
    assert followed(low, -1), low
    assert followed(high, 1), high


def auc(above: list[float], below: list[float]) -> float:
    """The probability that one of ``above`` exceeds one of ``below``, ties counting half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
    return wins / (len(above) * len(below))


@pytest.fixture(scope="module")
def held_out_answers():
    chats = Composer("test", seed=8).chats(10_000)
    return list(islice((answer for chat in chats for answer in chat.answers if answer.drawn), 1200))


@pytest.mark.parametrize("axis", ORACLES)
def test_measures_agree_with_the_corpus_labels_on_held_out_answers(axis, held_out_answers):
    measured = [(answer.drawn[axis], ORACLES[axis](answer.text)) for answer in held_out_answers]
    high = [value for drawn, value in measured if drawn > FOLLOWED]
    low = [value for drawn, value in measured if drawn < -FOLLOWED]
    assert min(len(high), len(low)) >= 100
    assert auc(high, low) >= 0.95


@pytest.mark.parametrize("axis", ["humor", "friendliness", "formality"])
def test_neutral_answers_are_measured_as_neutral(axis, held_out_answers):
    neutral = [ORACLES[axis](answer.text) for answer in held_out_answers if answer.drawn[axis] == 0]
    assert sum(abs(value) >= FOLLOWED for value in neutral) <= 0.1 * len(neutral)


@given(st.text(max_size=300))
def test_any_text_has_measures_in_range(text):
    assert all(-1 <= value <= 1 for value in measure(text).values())


def test_joking_does_not_count_as_an_answer_in_more_depth():
    plain = "Rinse the rice in cold water until it runs clear."
    assert measure(f"{plain} Ha, what a funny joke!")["verbosity"] == measure(plain)["verbosity"]


def test_the_neutral_length_is_that_of_the_corpus():
    answers = [answer for chat in Composer("train", seed=3).chats(2500) for answer in chat.answers if answer.drawn]
    neutral = [answer.text for answer in answers if not any(answer.drawn.values())]
    assert len(neutral) > 150
    assert median(len(words_of(text)) for text in neutral) == pytest.approx(NEUTRAL_WORDS, abs=3)


def test_word_lists_name_no_held_out_marker():
    """What was added for the corpus must not single out a marker that only the development or test split has."""

    def leaves(table, keys):
        for key, value in table.items():
            if isinstance(value, dict):
                yield from leaves(value, keys)
            elif key in keys:
                yield from value

    markers = load_styles().markers
    for axis in ("humor", "friendliness", "formality", "complexity"):
        for side in ("negative", "positive"):
            for word in LEXICONS[axis][side]["corpus"]:
                pattern = re.compile(rf"(?<!\w)(?:{word})(?!\w)", re.IGNORECASE)
                assert any(pattern.search(marker) for marker in leaves(markers, ("train",))), word
