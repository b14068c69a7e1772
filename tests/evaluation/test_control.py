"""Fronts: hypervolume by hand, what a row holds, robust selection beside the best of as many."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from prefmw.arithmetic import put_dpa_on
from prefmw.evaluation.control import (
    Point,
    Trial,
    _spearman,
    front_rows,
    held_out_questions,
    hypervolume,
    plain_points,
    point_rows,
    policy_points,
    robust_rows,
)
from prefmw.evaluation.plots import plot_control
from prefmw.models.dpa import DPA
from prefmw.models.persrm import BackboneCard
from prefmw.models.reward import RewardCard
from prefmw.preferences import DPACard, default_dimensions
from prefmw.preferences.directions import from_angles
from prefmw.rewards import Scorer


@pytest.fixture
def scorer(backend):
    """Helpfulness is the number of vowels, verbosity that of words."""

    def read(texts):
        said = [backend.chat.tokenizer.decode(ids).rpartition("assistant\n")[2] for ids in texts]
        return torch.tensor([[float(sum(map(text.count, "aeiou"))), float(len(text.split()))] for text in said])

    return Scorer(RewardCard("words", ("helpfulness", "verbosity")), "1", backend.chat, read)


@pytest.fixture
def trial(backend, scorer):
    return Trial(held_out_questions("dev", 4, 0), backend, default_dimensions(), scorer)


def policy(backend, scorer, **values):
    card = DPACard("toy", cone={"verbosity": (-45, 45)}, backbone=asdict(BackboneCard.of(backend.chat)), **values)
    return put_dpa_on(DPA(card, "1", {}), backend.chat, backend.engine, lambda: scorer)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(3, 2)], 6),
        ([(3, 2), (1, 4)], 8),
        ([(3, 2), (1, 4), (1, 1)], 8),
        ([(3, 2), (3, 2)], 6),
        ([(-1, 5)], 0),
        ([(2, 3), (3, 1), (1, 4)], 3 * 1 + 2 * 2 + 1 * 1),
    ],
)
def test_hypervolume_is_the_area_dominated(points, expected):
    assert hypervolume(np.array(points, dtype=float)) == pytest.approx(expected)


def test_hypervolume_against_counted_cells():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 20, size=(6, 2)).astype(float)
    cells = sum(any(a > x and b > y for a, b in points) for x in range(20) for y in range(20))
    assert hypervolume(points) == cells


def test_ranks_correlate_whatever_the_sizes():
    assert _spearman([1, 2, 3], [10, 20, 9000]) == 1
    assert _spearman([1, 2, 3, 4], [5, 5, 5, 6]) == pytest.approx(0.7746, abs=1e-4)


def points_of(trial: Trial, name: str, scores: list[tuple[float, float]]) -> list[Point]:
    """Points whose every reply has the same scores."""
    angles = [45 - 90 * place / max(1, len(scores) - 1) for place in range(len(scores))]
    return [
        Point(name, "", from_angles([angle]), ["Keep it dark."] * 4, np.tile(np.array(pair), (4, 1)))
        for angle, pair in zip(angles, scores, strict=True)
    ]


def test_a_front_that_dominates_has_more_volume_in_both_kinds(trial):
    better = points_of(trial, "better", [(80, 90), (80, 50), (70, 20)])
    worse = points_of(trial, "worse", [(70, 80), (70, 50), (60, 30)])
    fronts, over = front_rows(trial, [*better, *worse])
    rows = {row["policy"]: row for row in fronts}
    gains = {row["policy"]: row for row in over}
    assert (rows["better"]["spearman"], rows["better"]["falls"]) == (1, 2)
    for front in ("brief", "long"):
        gain = gains["better"][front]
        assert gain["mean"] > 0
        assert gain["ci95"][0] > 0
        assert gains["worse"][front]["mean"] == pytest.approx(-gain["mean"])
    assert rows["better"]["brief"] == pytest.approx((70 * 80 + 80 * 50 - 70 * 50) / 1e4, abs=0.2)
    assert rows["better"]["long"] == pytest.approx(0.72)


def test_every_policy_answers_the_same_questions(trial, backend, scorer, tmp_path):
    points = [*plain_points(trial), *policy_points(trial, "dpa", policy(backend, scorer), 3)]
    targets = ((80.0, 20.0), (60.0, 50.0))
    points += policy_points(trial, "steerlm", policy(backend, scorer, condition="rewards", targets=targets), 3)
    rows = point_rows(trial, points)
    assert [row["policy"] for row in rows] == ["plain", "prompt", "prompt", *["dpa"] * 3, *["steerlm"] * 2]
    assert [row["angle"] for row in rows[3:6]] == [45, 0, -45]
    assert rows[6]["asked"] == "80, 20"
    assert all(row["n"] == 4 and row["reward"].keys() == {"helpfulness", "verbosity"} for row in rows)
    low, high = rows[3]["verbosity_ci95"]
    assert low <= rows[3]["verbosity"] <= high
    plot_control(rows, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_robust_selection_stands_beside_the_best_of_as_many(trial, backend, scorer):
    rows = robust_rows(trial, "dpa", policy(backend, scorer), [from_angles([-60]), from_angles([0])], 3)
    assert [row["how"] for row in rows] == ["one", "best of 3", "robust 3"] * 2
    assert rows[0]["angle"] == -60
    assert rows[2]["over_best_of"]["mean"] == pytest.approx(rows[2]["value"] - rows[1]["value"], abs=2e-3)
    assert "over_best_of" not in rows[1]


def test_questions_are_the_split_s_and_the_same_again():
    one = held_out_questions("test", 20, 3)
    assert [question.text for question in one] == [question.text for question in held_out_questions("test", 20, 3)]
    assert all(question.text in question.topic.test_questions for question in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "train"], "a split is dev or test"),
        (["--run", "/nowhere"], "holds no iteration of a 'prefmw train dpa'"),
        (["--dpa", "nowhere/at/all"], "no DPA checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    from prefmw.cli.main import run

    assert run(["eval", "control", "--n", "2", *arguments]) == 2
    assert message in capsys.readouterr().err
