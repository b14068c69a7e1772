"""Runs: what is measured is kept, a killed run goes on, and nothing of another run or version is mixed in."""

from __future__ import annotations

import json

import pytest

from prefmw.errors import UsageError
from prefmw.evaluation import runs
from prefmw.evaluation.runs import FORMAT, Run, git

SETTINGS = {"seed": 1, "n": 3, "conditions": ["none"]}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_a_unit_is_measured_once(folder):
    calls = []
    for _ in range(2):
        run = Run("steer", SETTINGS, folder)
        assert run.unit("a", lambda: calls.append(1) or {"x": [1, 2]}) == {"x": [1, 2]}
    assert calls == [1]


def test_without_a_folder_nothing_is_kept(tmp_path):
    run = Run("steer", SETTINGS)
    assert run.unit("a", lambda: 1) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_result_says_how_it_came_to_be(folder):
    run = Run("steer", SETTINGS, folder)
    result = run.result(rows=[{"x": 1}])
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["settings"].items() >= SETTINGS.items()
    assert {"versions", "git"} <= set(result["settings"])
    assert {"prefmw", "torch", "transformers"} == set(result["settings"]["versions"])
    assert (result["command"], result["format"]) == ("steer", FORMAT)


def test_a_line_that_a_kill_cut_off_is_measured_again(folder):
    run = Run("steer", SETTINGS, folder)
    run.unit("a", lambda: 1)
    with (folder / "units.jsonl").open("a") as file:
        file.write('{"unit": "b", "val')
    again = Run("steer", SETTINGS, folder)
    assert [again.unit(name, lambda: 2) for name in "ab"] == [1, 2]
    last = Run("steer", SETTINGS, folder)
    assert [last.unit(name, lambda: 3) for name in "ab"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {**SETTINGS, "seed": 2}}, "other settings .*seed: 2, here 1"),
        ({"command": "choice"}, "another command"),
        ({"versions": {"prefmw": "0.0.1", "torch": "1", "transformers": "4"}}, "another version .*prefmw: 0.0.1"),
        ({"code": "0123456789ab"}, "another version .*0123456789ab"),
        ({"format": FORMAT + 1}, "another version .*format"),
        ({"format": None}, "another version .*format"),
    ],
)
def test_a_folder_of_another_run_is_refused(folder, change, said):
    Run("steer", SETTINGS, folder).unit("a", lambda: 1)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | change))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UsageError, match=said):
        Run("steer", SETTINGS, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_that_is_none_or_holds_something_else_is_refused(folder, tmp_path):
    folder.write_text("x")
    with pytest.raises(UsageError, match="is no folder"):
        Run("steer", SETTINGS, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("x")
    with pytest.raises(UsageError, match="holds no run"):
        Run("steer", SETTINGS, other)
    for damaged in ("{", "[]"):
        (other / "run.json").write_text(damaged)
        with pytest.raises(UsageError, match="run again"):
            Run("steer", SETTINGS, other)
    with pytest.raises(UsageError, match="cannot be used"):
        Run("steer", SETTINGS, folder / "below a file")


def test_damaged_units_are_refused(folder):
    Run("steer", SETTINGS, folder)
    (folder / "units.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match="is damaged"):
        Run("steer", SETTINGS, folder)


def test_the_commit_is_that_of_this_checkout_or_none(monkeypatch):
    found = git()
    assert found is None or (len(found.commit.removesuffix("-dirty")), len(found.code.removesuffix("-dirty"))) == (
        12,
        40,
    )
    git.cache_clear()
    monkeypatch.setattr(runs.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert git() is None
    git.cache_clear()
