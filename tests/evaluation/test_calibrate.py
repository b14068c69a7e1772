"""A model's own words and midpoints: what is measured is what half a weight does, and nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from prefmw.alignment.drift import shares
from prefmw.errors import UsageError
from prefmw.evaluation import calibrate, steer
from prefmw.evaluation.calibrate import HALF, MIDPOINTS, Trials, pairs, sentences
from prefmw.preferences import default_dimensions, parse_dimensions
from prefmw.training import unfinished
from prefmw.training.unfinished import Unfinished

ONE = """
[calm]
negative = { name = "wild", principle = "Be wild.", wordings = ["Rage.", "Storm."] }
positive = { name = "calm", principle = "Be calm.", wordings = ["Rest."] }
"""


class Scripted(Trials):
    """Replies that say how they were asked for; every sentence of the other pair reads the same from them.

    A reply leans as far as the weight goes, twice as far by "Rest." as by the principle.
    """

    @functools.cached_property
    def force(self):
        return {"Be wild.": 1.0, "Rage.": 1.0, "Storm.": 1.0, "Be calm.": 0.5, "Rest.": 1.0}

    def replies(self, people):
        for dimension, weight in people:
            pole = None if dimension is None else dimension.pole(weight)
            lean = 0.0
            if pole is not None:
                gone = float(shares(torch.tensor(abs(weight)), torch.tensor(pole.midpoint)))
                lean = math.copysign(gone, weight) * self.force[pole.principle]
            yield [f"{lean + noise} stands for a reply." for noise in self.noise]

    @property
    def noise(self):
        return np.linspace(-1.5, 1.5, len(self.questions))

    def scores(self, replies, dimension, columns):
        said = np.array([float(reply.split()[0]) if reply else np.nan for reply in replies])
        return np.repeat(said[:, None], len(list(columns)), axis=1)


@pytest.fixture
def scripted(backend):
    return Scripted(backend, [f"{number}?" for number in range(40)])


def test_every_sentence_is_in_a_pair():
    calm = parse_dimensions(ONE)["calm"]
    assert sentences(calm, -1) == ("Be wild.", "Rage.", "Storm.")
    assert pairs(calm) == [(0, 0), (1, 1), (2, 0)]


def delta(shift):
    """Cliff's delta of replies that a shift moved, among uniform ones 3 wide."""
    return 1 - (1 - shift / 3) ** 2


def test_the_sentence_that_moves_further_wins_and_half_a_weight_does_half_of_what_it_does(scripted):
    found, rows = calibrate.calibrate(scripted, parse_dimensions(ONE), lambda what, share: None)
    calm, wild = found.poles["calm"]["calm"], found.poles["calm"]["wild"]
    assert (calm.principle, wild.principle) == ("Rest.", "Be wild.")  # what is as good as the first gives way to it
    for row in rows:
        assert row["reached"]
        assert row["moves"][row["wording"]] == pytest.approx(delta(1.0), abs=0.03)
        assert row["moved"] == pytest.approx(HALF * delta(1.0), abs=0.03)
        assert delta(row["midpoint"]) == pytest.approx(HALF * delta(1.0), abs=0.03)


def test_a_model_that_half_a_weight_does_not_move_goes_the_farthest_and_is_said_to_fall_short(scripted):
    class Deaf(Scripted):
        def replies(self, people):
            return super().replies([(dimension, weight if abs(weight) == 1 else 0.0) for dimension, weight in people])

    deaf = Deaf(scripted.backend, scripted.questions)
    _, rows = calibrate.calibrate(deaf, parse_dimensions(ONE), lambda what, share: None)
    assert all(row["midpoint"] == MIDPOINTS[-1] and not row["reached"] for row in rows)


def test_a_pole_whose_sentence_does_nothing_is_left_in_the_middle(scripted):
    scripted.force.update(dict.fromkeys(scripted.force, 0.0))
    _, rows = calibrate.calibrate(scripted, parse_dimensions(ONE), lambda what, share: None)
    assert all(row["midpoint"] == 0.5 and row["wording"] == 0 and not row["reached"] for row in rows)
    assert all(row["moved"] is None for row in rows)


def test_a_movement_within_two_standard_errors_is_none(scripted):
    scripted.force.update(dict.fromkeys(scripted.force, 0.05))
    _, rows = calibrate.calibrate(scripted, parse_dimensions(ONE), lambda what, share: None)
    assert all(row["moves"][0] > 0 and row["midpoint"] == 0.5 and row["moved"] is None for row in rows)


class Watched(Scripted):
    """The same, and whom they were asked as."""

    @functools.cached_property
    def asked(self):
        return []

    def replies(self, people):
        for person, said in zip(people, super().replies(people), strict=True):
            self.asked.append(person)
            yield said


@pytest.fixture
def watched(scripted):
    return Watched(scripted.backend, scripted.questions)


def test_midpoints_are_tried_from_the_least_until_one_suffices(watched):
    _, rows = calibrate.calibrate(watched, parse_dimensions(ONE), lambda what, share: None)
    midpoints = [
        dimension.pole(weight).midpoint for dimension, weight in watched.asked if dimension and abs(weight) == 0.5
    ]
    assert max(row["midpoint"] for row in rows) <= max(midpoints) < MIDPOINTS[-1]
    assert sorted(midpoints) == sorted(2 * [half for half in MIDPOINTS if half <= max(midpoints)])


def test_a_killed_calibration_goes_on_and_comes_to_what_an_unbroken_one_does(scripted, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    registry, about = parse_dimensions(ONE), scripted.about(parse_dimensions(ONE))
    found, rows = calibrate.calibrate(scripted, registry, lambda what, share: None)
    shares = []

    def killed(what, share):
        shares.append(share)
        if len(shares) % 4 == 0:
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            calibrate.calibrate(watched, registry, killed, Unfinished(tmp_path / "c.json", about))
    assert shares == sorted(shares)
    calm = Unfinished(tmp_path / "c.json", about)
    again, same = calibrate.calibrate(watched, registry, lambda what, share: None, calm)
    assert (again, same) == (found, rows)
    settings = [(dimension.pole(weight), weight) for dimension, weight in watched.asked if dimension]
    assert len(settings) - len(set(settings)) == 3  # what a kill fell into, and nothing else, is asked twice
    assert [dimension for dimension, _ in watched.asked].count(None) == 1


@pytest.mark.parametrize("other", [{"seed": 1}, {"questions": ["Why?"]}])
def test_a_calibration_does_not_go_on_with_another_s_measurements(scripted, tmp_path, other):
    registry = parse_dimensions(ONE)
    Unfinished(tmp_path / "c.json", scripted.about(registry))
    with pytest.raises(UsageError, match="unfinished work with other settings"):
        Unfinished(tmp_path / "c.json", dataclasses.replace(scripted, **other).about(registry))


def test_a_reply_that_was_given_plainly_as_well_does_not_move(scripted):
    """However its scores come out the second time, of which the last bits depend on what is read beside it."""

    class Noisy(Scripted):
        def replies(self, people):
            for _ in people:
                yield ["The same."] * len(self.questions)

        def scores(self, replies, dimension, columns):
            assert set(replies) in ({"The same."}, {None})
            return np.random.default_rng(len(set(replies) & {None})).normal(size=(len(replies), 1)) * np.ones(
                len(list(columns))
            )

    _, rows = calibrate.calibrate(
        Noisy(scripted.backend, scripted.questions), parse_dimensions(ONE), lambda what, share: None
    )
    assert all(row["moves"] == [0.0] * len(row["moves"]) for row in rows)


def test_a_real_model_is_measured_end_to_end(backend, monkeypatch):
    monkeypatch.setattr(steer, "MAX_TOKENS", 8)  # this one never ends by itself
    humor = parse_dimensions("", {"humor": default_dimensions()["humor"]})
    trials = Trials(backend, ["How do I fall asleep faster?"] * 2)
    found, rows = calibrate.calibrate(trials, humor, lambda what, share: None)
    assert [row["pole"] for row in rows] == ["serious", "humorous"]
    assert found.model == backend.chat.name
    assert found.revision == backend.chat.revision
    for row in rows:
        assert row["principle"] in sentences(humor["humor"], -1 if row["pole"] == "serious" else 1)
        assert MIDPOINTS[0] <= row["midpoint"] <= MIDPOINTS[-1]
