"""What a clause is about, and whether it is wanted."""

from __future__ import annotations

import pytest

from prefmw.preferences.cues import subject


@pytest.mark.parametrize(
    ("clause", "about", "wanted"),
    [
        ("Keep it short.", "Keep it short", 1),
        ("I can't stand puns.", "I puns", -1),
        ("No jokes, please.", "jokes, please", -1),
        ("dont joke", "joke", -1),
        ("I’m tired of long answers", "I’m long answers", -1),
        ("Don't hold back on the jokes.", "the jokes", 1),
        ("Never skip the details.", "the details", 1),
        ("There's not enough fun in your answers.", "There's fun in your answers", 1),
        ("Instead of a sober account, give me the funny version.", "give me the funny version", 1),
        ("Images rather than figures.", "Images", 1),
        ("I prefer short answers to long ones.", "short answers", 1),
        ("Less theory and more examples.", "more examples", 1),
    ],
)
def test_cues_are_taken_out_and_turn_the_wish_round(clause, about, wanted):
    found = subject(clause)
    assert (found.text.rstrip("."), found.wanted) == (about.rstrip("."), wanted)


@pytest.mark.parametrize("clause", ["", "no", "Skip nothing.", "not without"])
def test_a_clause_of_cues_alone_stays_as_it_is(clause):
    assert subject(clause).text == clause
