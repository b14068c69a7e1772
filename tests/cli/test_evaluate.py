"""Runs from the command line: resumed, refused, drawn, reported."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

STEER = ["eval", "steer", "--methods", "none,linear", "--n", "2", "--split", "dev", "--no-controls"]
CHOICE = ["eval", "choice", "--by", "likelihood", "--n", "2", "--methods", "none,prompt,linear", "--no-controls"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs."""
    from prefmw.cli.main import run

    folder = tmp_path_factory.mktemp("runs")
    assert run([*STEER, "--out", str(folder / "steer")]) == 0
    assert run([*CHOICE, "--split", "dev", "--ratios", "0,1,2", "--out", str(folder / "choice")]) == 0
    return folder


def test_a_run_has_its_result_and_its_figure(runs):
    for name in ("steer", "choice"):
        result = json.loads((runs / name / "result.json").read_text())
        assert result["command"] == name
        assert {"n", "seed", "model", "model_revision", "versions", "git"} <= set(result["settings"])
        assert all(row["ci95"][0] <= row["ci95"][1] for row in result["rows"])
        assert "cost_ratio" in result["rows"][0]
        assert (runs / name / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_told_again_and_another_is_refused(prefmw, runs):
    code, out, _ = prefmw(*STEER, "--out", str(runs / "steer"), "--json")
    assert code == 0
    assert json.loads(out) == json.loads((runs / "steer" / "result.json").read_text())
    code, out, err = prefmw(*STEER, "--seed", "1", "--out", str(runs / "steer"))
    assert (code, out) == (2, "")
    assert re.search(r"holds a run of other settings \(seed: 0, here 1\)", err)
    assert "a run of another command" in prefmw(*CHOICE, "--split", "dev", "--out", str(runs / "steer"))[2]


class Page(HTMLParser):
    """The tags of a page, which close in order, and its table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_report_is_one_page_that_needs_no_other(prefmw, runs, tmp_path):
    code, out, err = prefmw("eval", "report", str(runs))
    assert (code, out, "2 runs" in err) == (0, "", True)
    text = (runs / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert "linear 2" in page.cells
    assert 'name="viewport"' in text
    assert "@media print" in text
    assert "model_revision" in text


def test_tables_are_put_in_a_document(prefmw, runs, tmp_path):
    document = tmp_path / "results.md"
    document.write_text(
        "# Results\n\n<!-- table steer -->\nold\n<!-- end -->\n\n<!-- table later -->\nstays\n<!-- end -->\n"
    )
    code, _, err = prefmw("eval", "report", str(runs), "--out", str(document))
    assert code == 0
    assert err.endswith("stay as they were: later\n")
    text = document.read_text()
    assert "| method | verbosity | complexity |" in text
    assert "old" not in text
    assert "stays" in text
    before = text
    assert prefmw("eval", "report", str(runs), "--out", str(document))[0] == 0
    assert document.read_text() == before


def test_without_matplotlib_the_tables_come_and_a_line_says_what_to_install(prefmw, runs, tmp_path, monkeypatch):
    from prefmw.evaluation import plots

    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, out, err = prefmw(*CHOICE, "--split", "dev", "--out", str(tmp_path / "run"))
    assert (code, "linear 2" in out) == (0, True)
    assert "pip install 'prefmw[eval]'" in err
    assert not (tmp_path / "run" / "figure.png").exists()


def test_mistakes_are_one_line(prefmw, runs, tmp_path):
    other = tmp_path / "old"
    other.mkdir()
    (other / "result.json").write_text('{"format": 0, "command": "steer", "rows": [], "settings": {}}')
    plain = tmp_path / "plain.md"
    plain.write_text("no place")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for arguments, said in (
        (["eval", "report", "/nowhere"], "holds no finished run"),
        (["eval", "report", str(other)], "another version"),
        (["eval", "report", str(runs), "--out", "x.pdf"], "neither a page"),
        (["eval", "report", str(runs), "--out", "/nowhere/x.html"], "cannot be written"),
        (["eval", "report", str(runs), "--out", str(tmp_path / "none.md")], "has to be there already"),
        (["eval", "report", str(runs), "--out", str(plain)], "no place for a table"),
        ([*CHOICE, "--by", "magic"], "letter or likelihood"),
        ([*CHOICE, "--split", "train"], "dev or test"),
        ([*CHOICE, "--ratios", "1,2"], "--split dev"),
        ([*CHOICE, "--ratios", "one"], "numbers joined by commas"),
        ([*CHOICE, "--ratios", ""], "numbers joined by commas"),
        ([*CHOICE, "--strength", "99"], "[0, 10]"),
        ([*CHOICE, "--ratios", "11", "--split", "dev"], "[0, 10]"),
        ([*CHOICE, "--data", str(data)], "domain, preference_a"),
        ([*CHOICE, "--data", str(tmp_path / "empty.jsonl")], "no question"),
        ([*CHOICE, "--data", "/nowhere.jsonl"], "cannot be read"),
        ([*CHOICE, "--data", "nobody/nothing"], "nor on the hub"),
        ([*STEER, "--out", str(plain)], "is no folder"),
        ([*STEER, "--out", str(tmp_path)], "holds no run"),
    ):
        code, out, err = prefmw(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert said in err, (said, err)


def test_rewards_are_told_and_mistakes_are_one_line(prefmw, tmp_path, tiny):
    arguments = ["eval", "rewards", "--n", "1", "--split", "dev", "--methods", "none,prompt", "--no-controls"]
    arguments += ["--reward", "zero-shot", "--judge", "oracle"]
    code, out, _ = prefmw(*arguments, "--out", str(tmp_path / "run"))
    assert (code, "win rate" in out, "diversity" in out) == (0, True, True)
    assert (tmp_path / "run" / "figure.png").exists()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "How?"}\n')
    for more, said in (
        (["--reward", "nothing"], "NAME=MODEL"),
        (["--reward", "x=/nowhere"], "no reward model"),
        (["--data", str(prompts)], "name reward models"),
        (["--data", "/nowhere.jsonl", "--reward", "x=y"], "cannot be read"),
        (["--data", str(prompts), "--reward", "zero-shot", "--methods", "drift"], "drift acts by weights"),
        (["--data", str(prompts), "--reward", "zero-shot", "--methods", "none"], "judges held-out questions alone"),
    ):
        code, out, err = prefmw("eval", "rewards", *more)
        assert (code, out, err.count("\n")) == (2, "", 1), (more, err)
        assert said in err, (said, err)
