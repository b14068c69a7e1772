"""The embedded DPA checkpoint: its budget, that it is its recipe's and tiny's, and that it obeys directions."""

from __future__ import annotations

import json

import pytest

from prefmw.bootstrap import close_engines, load_backend
from prefmw.embedded import embedded_path
from prefmw.evaluation.control import Trial, held_out_questions, policy_points
from prefmw.models.dpa import load_dpa
from prefmw.models.persrm import BackboneCard
from prefmw.preferences import default_dimensions
from prefmw.settings import load_settings
from prefmw.training.dpa_recipe import load_dpa_recipe

FOLDER = embedded_path("tiny-dpa")


@pytest.fixture(scope="module")
def backend():
    """`tiny` as the settings load it."""
    yield load_backend(load_settings({"model": "tiny"}))
    close_engines()


def test_it_keeps_its_budget():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 1_500_000


def test_it_is_its_recipe_s_and_tiny_s(backend):
    card, recipe = load_dpa(FOLDER).card, load_dpa_recipe("tiny")
    assert card.prompt((0.8, -0.6)) == recipe.card().prompt((0.8, -0.6)) == "Be 8 * helpful + 6 * concise."
    assert dict(card.cone) == {"verbosity": (-45.0, 45.0)}
    assert card.training["iteration"] == recipe.iterations
    assert BackboneCard(**card.backbone) == BackboneCard.of(backend.chat)


def test_it_obeys_directions(backend):
    """Of 48 held-out questions, whose mean verbosity has a standard error of some 4: expected are 78, 68 and 9."""
    trial = Trial(held_out_questions("dev", 48, 0), backend, default_dimensions(), None)
    points = policy_points(trial, "dpa", backend.arithmetic(), 3)
    long, middle, brief = (point.oracles[:, 1].mean() for point in points)
    assert middle > brief + 35
    assert long > brief + 45


# eval control, as a person calls it


def control(capsys, *arguments: str) -> str:
    from prefmw.cli.main import run

    assert run(["eval", "control", "--n", "2", "--split", "dev", *arguments]) == 0
    return capsys.readouterr().out


def test_a_kept_run_goes_on_and_says_the_same(tmp_path, capsys):
    arguments = ("--directions", "2", "--out", str(tmp_path / "run"), "--json")
    first = json.loads(control(capsys, *arguments))
    assert [row["asked"] for row in first["rows"]] == ["", "verbosity -1", "verbosity +1", "+45°", "-45°"]
    assert [row["policy"] for row in first["fronts"]] == ["plain", "prompt", "tiny-dpa"]
    assert {(row["policy"], row["other"]) for row in first["over"]} >= {("tiny-dpa", "plain"), ("plain", "tiny-dpa")}
    assert (tmp_path / "run" / "figure.png").stat().st_size > 1000
    units = (tmp_path / "run" / "units.jsonl").read_text()
    assert json.loads(control(capsys, *arguments)) == first
    assert (tmp_path / "run" / "units.jsonl").read_text() == units


def test_angles_within_a_degree_have_replies_of_their_own(tmp_path, capsys):
    kept = tmp_path / "replies.jsonl"
    control(capsys, "--angle", "-20.4", "--angle", "-19.6", "--replies", str(kept))
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 2 * 5
    assert {row["asked"] for row in rows if row["policy"] == "tiny-dpa"} == {"-20.4°", "-19.6°"}


def test_tables_are_read_by_people(capsys):
    shown = control(capsys, "--directions", "2")
    assert "spearman" in shown
    assert "fronts" in shown
    robust = control(capsys, "--robust", "2", "--angle", "-60")
    assert "best of 2" in robust
    assert "robust 2" in robust


def test_replies_of_robust_selection_are_not_kept(tmp_path, capsys):
    from prefmw.cli.main import run

    assert run(["eval", "control", "--robust", "2", "--replies", str(tmp_path / "x.jsonl")]) == 2
    assert "leave out --robust" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()
