"""A calibration applied to a registry, and its file."""

from __future__ import annotations

import logging

import pytest

from prefmw.bootstrap import calibration_file, load_dimensions
from prefmw.embedded import embedded_path, shipped_calibration
from prefmw.errors import UsageError
from prefmw.evaluation.held_out import profile_of
from prefmw.models.chat_model import fingerprint
from prefmw.preferences import default_dimensions, dials_of, principle_text
from prefmw.preferences.calibration import Calibration, Tuned
from prefmw.settings import load_settings

HUMOR = default_dimensions()["humor"]
OTHER = HUMOR.positive.wordings[0]
FOUND = Calibration("tiny", "r1", {"humor": {"humorous": Tuned(OTHER, 0.7), "serious": Tuned("Never heard.", 0.6)}})


def test_everything_reads_the_model_s_own_words_and_midpoints():
    dimensions = FOUND.applied(default_dimensions())
    person = profile_of({"humor": 0.5})
    assert principle_text(person, dimensions) == OTHER
    (dial,) = dials_of(person, dimensions)
    assert (dial.principle, dial.midpoint, dial.weight) == (OTHER, 0.7, 0.5)


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
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "", "midpoint": 0.5}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "midpoint": 0}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "midpoint": NaN}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "midpoint": 1}}}}',
        '{"model": "m", "revision": "r", "poles": {"humor": {"humorous": {"principle": "a", "midpoint": 0.9999999}}}}',
    ],
)
def test_what_is_no_calibration_is_refused(text):
    with pytest.raises(UsageError, match="calibration"):
        Calibration.from_json(text)


def test_tiny_ships_with_one_of_its_own_weights(home):
    shipped = Calibration.from_json(shipped_calibration("tiny").read_text(encoding="utf-8"))
    assert shipped.revision == fingerprint(embedded_path("tiny"))
    poles = [pole for one in default_dimensions().values() if one.kind == "style" for pole in one.poles]
    assert sorted(name for named in shipped.poles.values() for name in named) == sorted(poles)
    assert load_dimensions(load_settings({"model": "tiny"})) == shipped.applied(default_dimensions())
    assert load_dimensions(load_settings({"model": "another"})) == default_dimensions()
    assert shipped_calibration("../calibrations/tiny") is None


def test_one_s_own_calibration_comes_before_the_shipped_one(home, caplog):
    settings = load_settings({"model": "tiny"})
    file = calibration_file(settings)
    file.parent.mkdir(parents=True)
    file.write_text(FOUND.to_json(), encoding="utf-8")
    assert load_dimensions(settings) == FOUND.applied(default_dimensions())
    file.write_text("[]", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_dimensions(settings)["humor"].positive.midpoint not in (0.5, 0.7)
    assert "left aside" in caplog.text


def test_calibrations_may_be_left_aside(home, monkeypatch):
    monkeypatch.setenv("PREFMW_CALIBRATED", "false")
    assert load_dimensions(load_settings({"model": "tiny"})) == default_dimensions()
