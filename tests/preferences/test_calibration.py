"""A calibration applied to a registry, and its file."""

from __future__ import annotations

import pytest

from prefmw.errors import UsageError
from prefmw.evaluation.held_out import profile_of
from prefmw.preferences import default_dimensions, dials_of, principle_text
from prefmw.preferences.calibration import Calibration, Tuned

HUMOR = default_dimensions()["humor"]
OTHER = HUMOR.positive.wordings[0]
FOUND = Calibration("tiny", "r1", {"humor": {"humorous": Tuned(OTHER, 2.5), "serious": Tuned("Never heard.", 3.0)}})


def test_everything_reads_the_model_s_own_words_and_gains():
    dimensions = FOUND.applied(default_dimensions())
    person = profile_of({"humor": 0.5})
    assert principle_text(person, dimensions) == OTHER
    (dial,) = dials_of(person, dimensions)
    assert (dial.principle, dial.gain, dial.weight) == (OTHER, 2.5, 0.5)


def test_a_sentence_that_the_registry_no_longer_has_is_left_aside():
    dimensions = FOUND.applied(default_dimensions())
    assert dimensions["humor"].negative == HUMOR.negative
    assert dimensions["verbosity"] == default_dimensions()["verbosity"]


def test_a_file_holds_all_of_it():
    assert Calibration.from_json(FOUND.to_json()) == FOUND


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"model": "m", "revision": "r", "poles": {"humor": 3}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "", "gain": 1}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "gain": 0}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "gain": NaN}}}}',
    ],
)
def test_what_is_no_calibration_is_refused(text):
    with pytest.raises(UsageError, match="calibration"):
        Calibration.from_json(text)
